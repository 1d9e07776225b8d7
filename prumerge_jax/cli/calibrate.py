"""Fits the coverage threshold of `cover` to a mean number of tokens, on images without labels.

python -m prumerge_jax.reductions.calibrate --checkpoint miniature --images DIR --tokens 64
    [--reduction cover:adaptive=coverage,min_tokens=8] [--limit 500] [--image_mode pad]

Prints the calibrated reduction, and percentiles of the tokens per image. The images must not be
those of the evaluation.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

from prumerge_jax.cli import command_line

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"}
BATCH = 8
PERCENTILES = (0, 5, 25, 50, 75, 95, 100)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the program."""
    command_line.run(_main, argv)


def _flags() -> flags.FlagValues:
    values = command_line.strings(
        ("checkpoint", None, "model directory, or miniature for the shipped model"),
        ("images", None, "folder of images without labels"),
        ("reduction", "cover:adaptive=coverage", "what is calibrated; its threshold is replaced"),
        ("image_mode", "pad", "pad or crop, as in the evaluation"),
    )
    flags.DEFINE_float("tokens", None, "mean tokens per image", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("limit", 500, "images to read at most", lower_bound=1, flag_values=values)
    return values


def _main(argv: Sequence[str]) -> None:
    values = _flags()
    command_line.parse(argv, values, __doc__)
    command_line.require(values, "checkpoint", "images", "tokens")
    folder = pathlib.Path(values.images)
    if not folder.is_dir():
        raise ValueError(f"--images {folder}: no such folder")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)[: values.limit]
    if not files:
        raise ValueError(f"--images {folder}: no image in it ({', '.join(sorted(SUFFIXES))})")
    # These take seconds to import; a mistyped flag is answered before.
    from prumerge_jax import reductions
    from prumerge_jax.evaluation.coverage import coverage
    from prumerge_jax.llava import Llava
    from prumerge_jax.reductions.budgets import fit_threshold
    from prumerge_jax.reductions.set_rules import Cover

    rule = reductions.parse(values.reduction)
    if not isinstance(rule, Cover) or rule.adaptive != "coverage":
        raise ValueError(
            f"--reduction {values.reduction}: expected cover with adaptive=coverage, which has a "
            "threshold"
        )
    model = Llava.load(values.checkpoint)
    curves = np.concatenate(
        [
            coverage(model, files[start : start + BATCH], rule, image_mode=values.image_mode)
            for start in range(0, len(files), BATCH)
        ]
    )
    fitted = fit_threshold(curves, values.tokens, least=rule.min_tokens, most=rule.max_tokens)
    print(reductions.spell(dataclasses.replace(rule, threshold=fitted.threshold)))
    _print_counts(fitted.counts)


def _print_counts(counts: np.ndarray) -> None:
    print(f"{len(counts)} images, {counts.mean():.1f} tokens per image")
    print("percentile  " + "".join(f"{p:6d}" for p in PERCENTILES))
    print("tokens      " + "".join(f"{n:6.0f}" for n in np.percentile(counts, PERCENTILES)))


if __name__ == "__main__":
    main()
