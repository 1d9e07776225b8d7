"""Reductions side by side on the digits: equal budgets, both position modes, several towers.

    python -m prumerge_jax.digits.compare --checkpoint miniature --split validation --output FILE

Choices are made on the validation split; the test split is for one last run. Several checkpoints,
separated by commas, are towers that were trained separately: answers are averaged over them, and
what holds for one of them alone shows as a wide interval. Per reduction it prints the accuracy of
each family of questions, its difference to a reference with a paired bootstrap over scenes, how
much of the digits' patches is kept, and how much less likely the answers that all tokens give
become. The file holds the same, every pair of reductions of equal budget, and every checkpoint on
its own.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from prumerge_jax import reductions
from prumerge_jax.data.packing import PositionIds
from prumerge_jax.digits.benchmark import Digits, is_right
from prumerge_jax.digits.questions import FAMILIES, Question, draw_with_questions
from prumerge_jax.digits.scenes import Scene
from prumerge_jax.engine.build import Draft, RequestBuilder
from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.kept import kept_patches
from prumerge_jax.engine.request import Answer, Request, SamplingParams
from prumerge_jax.evaluation.report.bootstrap import Interval, paired_bootstrap
from prumerge_jax.llava import Llava

METHODS = (
    "cover cover:merge=mean divprune top dpp idselection evocut mmtok holov prumerge-iterative "
    "intower tome cover:ranking=random cover:ranking=uniform prumerge:neighbours=8 select-only "
    "cover:adaptive=attention cover:adaptive=attention,merge=mean prumerge+:neighbours=8 pact "
    "fastv pyramiddrop sparsevlm"
)
REFERENCE, OUTLIERS = "cover", "prumerge:neighbours=8"
"""What others are compared with: at equal budgets, and where outliers decide how many are kept."""
BY_OUTLIERS = ("select-only", "cover:adaptive=attention", "cover:adaptive=attention,merge=mean")
POSITIONS: tuple[PositionIds, ...] = ("original", "compact")
FULL = "full"
COMPILE_SECONDS, QUESTION_SECONDS = 4.0, 0.01
"""Of a reduction, and of a question with one: answered, scored and its image encoded."""


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
        return [scene.image for scene in self.scene_of]

    @property
    def scene_of(self) -> list[Scene]:
        """The scene of every question."""
        return [s for s, asked in zip(self.scenes, self.questions, strict=True) for _ in asked]

    def first_of(self, values: Sequence[Request]) -> list[Request]:
        """Of one value per question that of each scene's first question."""
        starts = np.cumsum([0, *map(len, self.questions)])[:-1]
        return [values[start] for start in starts.tolist()]

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


def question_requests(model: Llava, asked: Asked) -> tuple[list[Draft], list[Request]]:
    """The questions as drafts and with their images; those of a scene share one."""
    builder = RequestBuilder(model.tokenizer, model.template(), model.processor(None, FULL))
    sampling = SamplingParams(max_new_tokens=Digits.max_new_tokens)
    drafts = builder.drafts(asked.images, asked.prompts, sampling)
    drafts = [
        dataclasses.replace(draft, images=((scene.id, scene.image),))
        for draft, scene in zip(drafts, asked.scene_of, strict=True)
    ]
    return drafts, list(builder.requests(drafts))


class Examiner:
    """Asks one model everything, with one reduction after the other.

    All reductions run in the shapes of `full`, so that what they have in common compiles once.
    """

    def __init__(self, model: Llava, asked: Asked) -> None:
        self.model, self.asked = model, asked
        drafts, self._requests = question_requests(model, asked)
        # Room for an answer, generated or to be scored.
        engine = model.engine(FULL, drafts, max_new_tokens=2 * Digits.max_new_tokens)
        self._placed, self._shapes = engine.model, engine.shapes

    def measure(self, names: Sequence[str], position_ids: PositionIds) -> dict[str, Measured]:
        """Answers, likelihoods and kept patches of every reduction; `full` is always the first."""
        measured: dict[str, Measured] = {}
        expected: list[np.ndarray] = []
        likely = np.zeros(())
        for name in dict.fromkeys([FULL, *names]):
            started = time.monotonic()
            engine = self._engine(name, position_ids)
            with self.model.placed():
                said = _in_order(engine.generate(self._requests))
                answers = [np.array(answer.token_ids, np.int32) for answer in said]
                expected = expected or answers
                scored = _in_order(engine.score(self._continued(expected)))
                kept = kept_patches(engine, self.asked.first_of(self._requests))
            scores = np.array([answer.log_likelihood for answer in scored])
            likely = scores if name == FULL else likely
            measured[name] = self._measured(name, answers, likely - scores, kept)
            print(
                f"{position_ids}, {name}: {100 * measured[name].mean:.1f} "
                f"({time.monotonic() - started:.1f} s)",
                flush=True,
            )
        return measured

    def _continued(self, answers: Sequence[np.ndarray]) -> list[Request]:
        """The requests with these answers to score, and what ends them."""
        end = self.model.config.eos_token_ids[:1]
        return [
            dataclasses.replace(request, continuation=np.array([*ids, *end], np.int32))
            for request, ids in zip(self._requests, answers, strict=True)
        ]

    def _engine(self, name: str, position_ids: PositionIds) -> Engine:
        reduction = reductions.parse(name)
        share = self._shapes.share_prefixes and not reduction.drops_tokens
        shapes = dataclasses.replace(self._shapes, share_prefixes=share)
        return Engine(self._placed, reduction, shapes, position_ids=position_ids)

    def _measured(
        self,
        name: str,
        answers: Sequence[np.ndarray],
        gap: np.ndarray,
        kept: Sequence[tuple[int, np.ndarray]],
    ) -> Measured:
        questions = [question for each in self.asked.questions for question in each]
        texts = [self.model.tokenizer.decode(ids) for ids in answers]
        right = [
            is_right(q.family, text, q.answer) for q, text in zip(questions, texts, strict=True)
        ]
        reduction, depth = reductions.parse(name), self.model.config.text.num_layers
        drops = reduction.drops(depth)
        size = self.model.config.vision.patch_size
        recall = [
            evidence_recall(scene.ink, patches, size)
            if reduction.selects_patches or name == FULL
            else float("nan")
            for scene, (_, patches) in zip(self.asked.scenes, kept, strict=True)
        ]
        tokens = [n if drops is None else drops.layer_average(n, depth) for n, _ in kept]
        return Measured(
            self.asked.by_family(right),
            self.asked.by_family(gap),
            np.array(tokens, np.float64),
            np.array(recall),
        )


def _in_order(answers: Iterable[Answer]) -> list[Answer]:
    """Answers by key.

    Raises:
      ValueError: a question could not be asked.
    """
    found = {answer.key: answer for answer in answers}
    for answer in found.values():
        if answer.error is not None:
            raise ValueError(f"question {answer.key}: {answer.error}")
    return [found[key] for key in sorted(found)]


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


def differences(
    measured: Mapping[str, Measured], pairs: Iterable[tuple[str, str]]
) -> dict[tuple[str, str], Interval]:
    """Of pairs of reductions, in points of the mean accuracy; scenes are resampled."""
    return {
        (first, second): paired_bootstrap(
            100 * np.nanmean(measured[first].right, 1), 100 * np.nanmean(measured[second].right, 1)
        )
        for first, second in pairs
    }


def equal_budgets(budget_of: Mapping[str, int | None]) -> list[tuple[str, str]]:
    """Every pair of reductions of one budget; None is a count of the reduction's own."""
    return [
        (first, second)
        for first, second in itertools.combinations(budget_of, 2)
        if budget_of[first] == budget_of[second]
    ]


def table(measured: Mapping[str, Measured], reference_of: Mapping[str, str]) -> str:
    """One line per reduction; the difference is to its reference, where it has one."""
    lines = [
        f"{'reduction':32} tokens  {'  '.join(f'{f:>8}' for f in FAMILIES)}      mean  recall"
        "     gap  difference to its reference"
    ]
    pairs = [(n, r) for n, r in reference_of.items() if r in measured and n in measured and n != r]
    compared = differences(measured, pairs)
    for name, own in measured.items():
        families = "  ".join(f"{100 * value:8.1f}" for value in np.nanmean(own.right, 0))
        line = (
            f"{name:32} {own.tokens.mean():6.1f}  {families}  {100 * own.mean:8.1f}"
            f"  {own.recall.mean():6.2f}  {np.nanmean(own.gap):6.2f}"
        )
        interval = compared.get((name, reference_of.get(name, "")))
        if interval is not None:
            line += f"  {interval.difference:+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"
        lines.append(line)
    return "\n".join(lines)


def record(
    measured: Mapping[str, Measured], pairs: Iterable[tuple[str, str]] = ()
) -> dict[str, object]:
    """The figures of a position mode as JSON values, with the differences of these pairs."""
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
    compared = [
        {"first": first, "second": second, **interval._asdict()}
        for (first, second), interval in differences(measured, pairs).items()
    ]
    return {"reductions": rows, "differences": compared}


def at_budgets(spellings: str, budgets: Sequence[int]) -> dict[str, int | None]:
    """The reductions at every budget, and VisionZip with as many tokens; None has none.

    Raises:
      ValueError: a spelling or a budget is not valid.
    """
    budget_of: dict[str, int | None] = {}
    for name in reductions.parse_list(spellings):
        several = reductions.with_budgets(name, budgets)
        budget_of |= {name: None} if several == [name] else dict(zip(several, budgets, strict=True))
    for budget in budgets:
        contextual = max(budget // 6, 1)  # as many as of the authors' 64
        zipped = f"visionzip:dominant={budget - 1 - contextual},contextual={contextual}"
        if spellings == METHODS:
            budget_of[zipped] = budget
    return budget_of


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m prumerge_jax.digits.compare",
        description="Compares reductions on the digits, see docs/reductions.md.",
    )
    parser.add_argument("--checkpoint", default="miniature", help="towers, separated by commas")
    parser.add_argument("--split", default="validation", help="validation for choices, test once")
    parser.add_argument("--scenes", type=int, default=100, help="four questions each")
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
    budget_of = at_budgets(arguments.reduction, [int(word) for word in arguments.tokens.split()])
    reference_of = {
        name: OUTLIERS if budget is None else f"{REFERENCE}:tokens={budget}"
        for name, budget in budget_of.items()
        if budget is not None or name in BY_OUTLIERS
    }
    names = arguments.checkpoint.split(",")
    positions = arguments.positions.split()
    asked = draw(arguments.split, arguments.scenes)
    print(f"{len(budget_of)} reductions, {len(positions)} position modes, {len(names)} towers, "
          f"{len(asked.prompts)} questions: about {_minutes(budget_of, positions, names, asked)} "
          "minutes on two cores", flush=True)  # fmt: skip
    examiners = [Examiner(Llava.load(name), asked) for name in names]
    found = {}
    for position_ids in positions:
        each = [examiner.measure(list(budget_of), position_ids) for examiner in examiners]
        mean = averaged(each)
        print(f"\n{arguments.split}, {arguments.scenes} scenes, {len(names)} towers, "
              f"{position_ids} positions\n{table(mean, reference_of)}\n", flush=True)  # fmt: skip
        found[position_ids] = {
            **record(mean, equal_budgets(budget_of)),
            "towers": dict(zip(names, map(record, each), strict=True)),
        }
        arguments.output.write_text(json.dumps(found, indent=1))


def _minutes(
    budget_of: Mapping[str, int | None],
    positions: Sequence[str],
    names: Sequence[str],
    asked: Asked,
) -> int:
    """What the run takes, from its parts as they were measured."""
    compiled = len(budget_of) * COMPILE_SECONDS
    answered = len(budget_of) * len(positions) * len(names) * len(asked.prompts) * QUESTION_SECONDS
    return max(round((compiled + answered) / 60), 1)


if __name__ == "__main__":
    main()
