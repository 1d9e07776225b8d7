"""Reductions side by side on the digits: equal budgets, both position modes, several towers.

    python -m prumerge_jax.digits.compare --checkpoint miniature --split validation --output FILE

Choices are made on the validation split; the test split is for one last run. Several checkpoints,
separated by commas, are towers that were trained separately: answers are averaged over them, and
what holds for one of them alone shows as a wide interval. Per reduction it prints the accuracy of
each family of questions, its difference to the reference with a paired bootstrap over scenes, how
much of the digits' patches is kept, and how much less likely the answers that all tokens give
become. The file holds the same, every pair of reductions, and every checkpoint on its own.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from prumerge_jax import reductions
from prumerge_jax.data.packing import PositionIds
from prumerge_jax.digits.benchmark import Digits, is_right
from prumerge_jax.digits.questions import FAMILIES, Question, draw_with_questions
from prumerge_jax.digits.scenes import Scene
from prumerge_jax.evaluation.report.bootstrap import Interval, paired_bootstrap
from prumerge_jax.llava import Llava

METHODS = (
    "cover divprune top dpp idselection evocut mmtok holov cover:ranking=random "
    "cover:ranking=uniform select-only prumerge:neighbours=8 prumerge+:neighbours=8"
)
POSITIONS: tuple[PositionIds, ...] = ("original", "compact")
FULL = "full"


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """The scenes, and questions about each.

    Attributes:
      scenes: [n].
      questions: [n], one of each family that the scene allows.
    """

    scenes: Sequence[Scene]
    questions: Sequence[Sequence[Question]]

    @property
    def images(self) -> list[np.ndarray]:
        """The image of every question."""
        return [
            s.image for s, asked in zip(self.scenes, self.questions, strict=True) for _ in asked
        ]

    @property
    def prompts(self) -> list[str]:
        """The text of every question."""
        return [question.text for asked in self.questions for question in asked]

    def by_family(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """One value per question as [n, families], NaN where a scene has no such question."""
        table = np.full((len(self.scenes), len(FAMILIES)), np.nan)
        asked = [(row, q.family) for row, each in enumerate(self.questions) for q in each]
        for (row, family), value in zip(asked, values, strict=True):
            table[row, FAMILIES.index(family)] = value
        return table


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """One reduction on one tower in one position mode.

    Attributes:
      right: [n, families] float, 1 for a right answer; NaN where nothing is asked.
      gap: [n, families] nats by which the answers that all tokens give are less likely.
      tokens: [n] visual tokens.
      recall: [n] share of the digits' patches that are kept, each digit counting alike; NaN where
        tokens are no patches.
    """

    right: np.ndarray
    gap: np.ndarray
    tokens: np.ndarray
    recall: np.ndarray

    @property
    def mean(self) -> float:
        """Accuracy, every family counting alike."""
        return float(np.nanmean(self.right, 0).mean())


def draw(split: str, scenes: int) -> Asked:
    """The first scenes of a split, with their questions."""
    drawn = [draw_with_questions(split, index, seed=0) for index in range(scenes)]
    return Asked(*zip(*drawn, strict=True))


def measure(
    model: Llava, asked: Asked, names: Sequence[str], position_ids: PositionIds
) -> dict[str, Measured]:
    """Answers, likelihoods and kept patches of every reduction; `full` is always among them."""
    measured: dict[str, Measured] = {}
    expected: list[str] = []
    likely = np.zeros(())
    for name in dict.fromkeys([FULL, *names]):
        answers = model.generate(
            asked.images,
            asked.prompts,
            reduction=name,
            position_ids=position_ids,
            max_new_tokens=Digits.max_new_tokens,
        )
        expected = expected or answers
        scores = np.array(
            model.score(
                asked.images, asked.prompts, expected, reduction=name, position_ids=position_ids
            )
        )
        likely = scores if name == FULL else likely
        truth = [question for each in asked.questions for question in each]
        right = [is_right(q.family, a, q.answer) for q, a in zip(truth, answers, strict=True)]
        kept = [
            _kept(model, *pair, name) for pair in zip(asked.scenes, asked.questions, strict=True)
        ]
        measured[name] = Measured(
            asked.by_family(right),
            asked.by_family(likely - scores),
            np.array([tokens for tokens, _ in kept]),
            np.array([recall for _, recall in kept]),
        )
        print(f"{position_ids}, {name}: {100 * np.nanmean(measured[name].right):.1f}", flush=True)
    return measured


def _kept(model: Llava, scene: Scene, asked: Sequence[Question], name: str) -> tuple[float, float]:
    """Visual tokens of an image, and the share of its digits' patches among them."""
    reduction = reductions.parse(name)
    explained = model.explain(scene.image, reduction=reduction, question=asked[0].text)
    if not reduction.selects_patches and name != FULL:
        return float(len(explained.patch_indices)), float("nan")
    return float(len(explained.patch_indices)), evidence_recall(
        scene.ink, explained.patch_indices, model.config.vision.patch_size
    )


def evidence_recall(ink: np.ndarray, patches: np.ndarray, patch_size: int) -> float:
    """Share of a digit's patches that are kept, mean over the digits of a scene.

    Args:
      ink: `Scene.ink`.
      patches: those that are kept, in raster numbering.
      patch_size: side of a patch in pixels.
    """
    side = len(ink) // patch_size
    blocks = ink.reshape(side, patch_size, side, patch_size)
    kept = np.isin(np.arange(side * side), patches)
    shares = []
    for digit in range(1, int(ink.max()) + 1):
        holds = (blocks == digit).any((1, 3)).ravel()
        if holds.any():
            shares.append(kept[holds].mean())
    return float(np.mean(shares))


def averaged(towers: Sequence[Mapping[str, Measured]]) -> dict[str, Measured]:
    """The mean over towers, per scene."""
    return {
        name: Measured(
            *(
                np.mean([getattr(tower[name], field.name) for tower in towers], axis=0)
                for field in dataclasses.fields(Measured)
            )
        )
        for name in towers[0]
    }


def differences(measured: Mapping[str, Measured]) -> dict[tuple[str, str], Interval]:
    """Of every pair of reductions, in points of the mean accuracy; scenes are resampled."""
    return {
        (first, second): paired_bootstrap(
            100 * np.nanmean(measured[first].right, 1), 100 * np.nanmean(measured[second].right, 1)
        )
        for first, second in itertools.permutations(measured, 2)
    }


def table(measured: Mapping[str, Measured], reference_of: Mapping[str, str]) -> str:
    """One line per reduction; the difference is to its reference, where it has one."""
    lines = [
        f"{'reduction':32} tokens  {'  '.join(f'{f:>8}' for f in FAMILIES)}      mean  recall"
        "     gap  difference to its reference"
    ]
    compared = differences(measured)
    for name, own in measured.items():
        families = "  ".join(f"{100 * value:8.1f}" for value in np.nanmean(own.right, 0))
        line = (
            f"{name:32} {own.tokens.mean():6.1f}  {families}  {100 * own.mean:8.1f}"
            f"  {own.recall.mean():6.2f}  {np.nanmean(own.gap):6.2f}"
        )
        reference = reference_of.get(name, "")
        if reference in measured and reference != name:
            interval = compared[name, reference]
            line += f"  {interval.difference:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"
        lines.append(line)
    return "\n".join(lines)


def record(measured: Mapping[str, Measured]) -> dict[str, object]:
    """The figures of a position mode as JSON values."""
    rows = {
        name: {
            "tokens": own.tokens.mean(),
            "accuracy": dict(zip(FAMILIES, (100 * np.nanmean(own.right, 0)).tolist(), strict=True)),
            "accuracy_mean": 100 * own.mean,
            "evidence_recall": None if np.isnan(own.recall).any() else own.recall.mean(),
            "log_likelihood_gap": np.nanmean(own.gap),
        }
        for name, own in measured.items()
    }
    pairs = [
        {"first": first, "second": second, **interval._asdict()}
        for (first, second), interval in differences(measured).items()
    ]
    return {"reductions": rows, "differences": pairs}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m prumerge_jax.digits.compare",
        description="Compares reductions on the digits, see docs/reductions.md.",
    )
    parser.add_argument("--checkpoint", default="miniature", help="towers, separated by commas")
    parser.add_argument("--split", default="validation", help="validation for choices, test once")
    parser.add_argument("--scenes", type=int, default=250, help="four questions each")
    parser.add_argument("--reduction", default=METHODS, help="names, separated by spaces")
    parser.add_argument("--tokens", default="9 18 27 54", help="budgets of fixed counts")
    parser.add_argument("--positions", default=" ".join(POSITIONS), help="position modes")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="JSON file to write")
    arguments = parser.parse_args()
    if unknown := set(arguments.positions.split()) - set(POSITIONS):
        parser.error(f"--positions: unknown {sorted(unknown)}; expected some of {POSITIONS}")
    if arguments.scenes < 1:
        parser.error(f"--scenes={arguments.scenes}: expected at least 1")
    return arguments


def main() -> None:
    """Runs the comparison that the command line describes."""
    arguments = _arguments()
    budgets = [int(word) for word in arguments.tokens.split()]
    reference_of: dict[str, str] = {}
    for name in reductions.parse_list(arguments.reduction):
        spellings = reductions.with_budgets(name, budgets)
        fixed = spellings != [name]
        for spelling, budget in zip(spellings, budgets, strict=False):
            reference_of[spelling] = f"cover:tokens={budget}" if fixed else ""
    asked = draw(arguments.split, arguments.scenes)
    towers = [Llava.load(name) for name in arguments.checkpoint.split(",")]
    found = {}
    for position_ids in arguments.positions.split():
        each = [measure(model, asked, list(reference_of), position_ids) for model in towers]
        mean = averaged(each)
        print(f"\n{arguments.split}, {arguments.scenes} scenes, {len(towers)} towers, "
              f"{position_ids} positions\n{table(mean, reference_of)}\n", flush=True)  # fmt: skip
        found[position_ids] = {
            **record(mean),
            "towers": dict(zip(arguments.checkpoint.split(","), map(record, each), strict=True)),
        }
    arguments.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
