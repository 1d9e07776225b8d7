"""What fewer bits cost on the digits: kernels in every format, with few and with all visual tokens.

    python -m prumerge_jax.digits.quantised --checkpoint miniature --output FILE

Per format and reduction it prints the accuracy and its difference to the unquantised model with a
paired bootstrap over scenes; the share of answers that are the same, and the first token that is
not; and, where both models read the unquantised model's answers, the mean and the 99th percentile
of KL(unquantised | quantised) over their tokens. That both keep the same patches of every image is
checked: the tower is not quantised. The file holds the same.
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from prumerge_jax import reductions
from prumerge_jax.data.packing import PositionIds
from prumerge_jax.digits.benchmark import Digits, is_right
from prumerge_jax.digits.compare import Asked, draw
from prumerge_jax.engine.build import RequestBuilder
from prumerge_jax.evaluation.report.bootstrap import Interval, paired_bootstrap
from prumerge_jax.llava import Llava
from prumerge_jax.models.quantisation import FORMATS

PLAIN = "float32"


@dataclasses.dataclass(frozen=True, eq=False)
class Read:
    """What a model makes of the questions with one reduction.

    Attributes:
      answers: one per question.
      log_probs: by question [T, V], of the tokens that the unquantised model answers.
      kept: by scene the patches.
    """

    answers: list[str]
    log_probs: list[np.ndarray]
    kept: list[np.ndarray]


@dataclasses.dataclass(frozen=True)
class Row:
    """One format with one reduction; `positions` are tokens that KL is taken over, `first_other`
    the mean place of the first token that differs, None where none does."""

    format: str
    reduction: str
    accuracy: float
    difference: Interval
    identical: float
    first_other: float | None
    kl_mean: float
    kl_p99: float
    positions: int


def read(
    model: Llava,
    asked: Asked,
    reduction: str,
    position_ids: PositionIds,
    forced: Sequence[str] | None,
) -> Read:
    """Answers, and log-probabilities along `forced` answers (None: its own)."""
    answers = model.generate(
        asked.images,
        asked.prompts,
        reduction=reduction,
        position_ids=position_ids,
        max_new_tokens=Digits.max_new_tokens,
    )
    builder = RequestBuilder(model.tokenizer, model.template(), model.processor(None, reduction))
    targets = [_ids(model, text) for text in (answers if forced is None else forced)]
    prompts = [builder.token_ids(text, 1) for text in asked.prompts]
    found = model.logits(
        asked.images,
        [np.concatenate(pair) for pair in zip(prompts, targets, strict=True)],
        reduction=reduction,
        position_ids=position_ids,
    )
    log_probs = [
        _log_softmax(logits[-len(ids) - 1 : -1]) for logits, ids in zip(found, targets, strict=True)
    ]
    kept = [model.explain(s.image, reduction=reduction).patch_indices for s in asked.scenes]
    return Read(answers, log_probs, kept)


def compared(
    asked: Asked, plain: Read, other: Read, tokens: Sequence[tuple[np.ndarray, np.ndarray]]
) -> dict[str, object]:
    """The fields of a `Row` but its names.

    Args:
      asked: the questions.
      plain, other: the unquantised model's and the quantised one's.
      tokens: both answers' ids, by question.
    """
    truth = [question for each in asked.questions for question in each]
    right, before = (
        100
        * np.nanmean(
            asked.by_family(
                [is_right(q.family, a, q.answer) for q, a in zip(truth, each.answers, strict=True)]
            ),
            1,
        )
        for each in (other, plain)
    )
    divergence = np.concatenate(
        [
            (np.exp(p) * (p - q)).sum(-1)
            for p, q in zip(plain.log_probs, other.log_probs, strict=True)
        ]
    )
    places = [place for pair in tokens if (place := first_difference(*pair)) is not None]
    return {
        "accuracy": float(right.mean()),
        "difference": paired_bootstrap(right, before),
        "identical": 1 - len(places) / len(tokens),
        "first_other": float(np.mean(places)) if places else None,
        "kl_mean": float(divergence.mean()),
        "kl_p99": float(np.quantile(divergence, 0.99)),
        "positions": len(divergence),
    }


def first_difference(first: np.ndarray, second: np.ndarray) -> int | None:
    """The place of the first token in which two answers differ, None where they are the same."""
    for place, (a, b) in enumerate(itertools.zip_longest(first.tolist(), second.tolist())):
        if a != b:
            return place
    return None


def measure(
    checkpoint: str,
    asked: Asked,
    formats: Sequence[str],
    names: Sequence[str],
    position_ids: PositionIds,
) -> list[Row]:
    """Every format with every reduction, the unquantised model first.

    Raises:
      RuntimeError: a quantised model keeps other patches.
    """
    plain_model = Llava.load(checkpoint, dtype=PLAIN)
    plain = {name: read(plain_model, asked, name, position_ids, None) for name in names}
    rows = []
    for form in (PLAIN, *formats):
        model = plain_model
        if form != PLAIN:
            model = Llava.load(checkpoint, dtype=PLAIN, quantize=form)
        for name in names:
            own = plain[name]
            if form != PLAIN:
                own = read(model, asked, name, position_ids, plain[name].answers)
            _check_same_patches(plain[name], own, form)
            pairs = zip(plain[name].answers, own.answers, strict=True)
            tokens = [(_ids(model, first), _ids(model, second)) for first, second in pairs]
            rows.append(Row(form, name, **compared(asked, plain[name], own, tokens)))  # type: ignore[arg-type]
            print(line(rows[-1]), flush=True)
    return rows


def line(row: Row) -> str:
    """A row of the table."""
    low, high = row.difference.low, row.difference.high
    first = "-" if row.first_other is None else f"{row.first_other:.1f}"
    return (
        f"{row.format:8} {row.reduction:26} {row.accuracy:6.2f}  {row.difference.difference:+.2f} "
        f"[{low:+.2f}, {high:+.2f}]  {100 * row.identical:6.1f} % {first:>6}  {row.kl_mean:.2e}  "
        f"{row.kl_p99:.2e}  {row.positions}"
    )


HEADER = (
    f"{'format':8} {'reduction':26} {'mean':>6}  difference and interval  identical  first other  "
    "KL mean  KL p99  positions"
)


def _check_same_patches(plain: Read, other: Read, form: str) -> None:
    for first, second in zip(plain.kept, other.kept, strict=True):
        if not np.array_equal(first, second):
            raise RuntimeError(f"{form} keeps other patches of an image: its tower was changed")


def _ids(model: Llava, text: str) -> np.ndarray:
    """An answer's tokens and the one that ends it."""
    return np.array([*model.tokenizer.encode(text), model.config.eos_token_ids[0]], np.int32)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison that the command line describes."""
    parser = argparse.ArgumentParser(
        "python -m prumerge_jax.digits.quantised", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--checkpoint", default="miniature", help="a model directory or a name")
    parser.add_argument("--split", default="test", help="validation or test")
    parser.add_argument("--scenes", type=int, default=250, help="four questions each")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--reduction", default="full prumerge:neighbours=8", help="names")
    parser.add_argument("--positions", default="original", choices=("original", "compact"))
    parser.add_argument("--output", type=pathlib.Path, required=True, help="JSON file to write")
    arguments = parser.parse_args(argv)
    names = list(reductions.parse_list(arguments.reduction))
    print(HEADER)
    rows = measure(
        arguments.checkpoint,
        draw(arguments.split, arguments.scenes),
        arguments.formats,
        names,
        arguments.positions,
    )
    values = [dataclasses.asdict(row) | {"difference": row.difference._asdict()} for row in rows]
    arguments.output.write_text(json.dumps(values, indent=1))


if __name__ == "__main__":
    main()
