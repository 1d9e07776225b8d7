"""Draws what a reduction keeps of an image and what it merges.

`python -m prumerge_jax.visualize --checkpoint DIR --image FILE --output out.png`
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from typing import NoReturn

import prumerge_jax
from prumerge_jax import reductions
from prumerge_jax.conversion.miniature import model_directory
from prumerge_jax.data.images import load_image
from prumerge_jax.evaluation.report.overlay import overlay
from prumerge_jax.options import quote, unknown


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        sys.exit(f"visualize: {message}")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a model on one image and saves the overlay."""
    parser = _Parser(
        prog="python -m prumerge_jax.visualize",
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
    )
    options = [
        parser.add_argument("--checkpoint", required=True, help="model directory, or miniature"),
        parser.add_argument("--image", required=True, help="file to look at"),
        parser.add_argument("--reduction", default="prumerge", help="as prumerge:neighbours=8"),
        parser.add_argument("--output", required=True, type=pathlib.Path, help="PNG to write"),
    ]
    flags = ["--help", *(option.option_strings[0] for option in options)]
    arguments = sys.argv[1:] if argv is None else argv
    for flag in (text.partition("=")[0] for text in arguments if text.startswith("--")):
        if flag not in flags:
            parser.error(unknown("unknown flag", flag, flags))
    try:
        _draw(parser.parse_args(arguments))
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))


def _draw(arguments: argparse.Namespace) -> None:
    output = arguments.output
    if output.suffix != ".png":
        raise ValueError(f"--output {quote(str(output))} does not end in .png")
    if not output.parent.is_dir():
        raise ValueError(f"--output {quote(str(output))}: no such folder, create it first")
    reduction = reductions.parse(arguments.reduction)
    image = load_image(arguments.image)
    model = prumerge_jax.Llava.load(model_directory(arguments.checkpoint))
    explanation = model.explain(image, reduction=reduction)
    figure = overlay(explanation.pixels, explanation.patch_indices, explanation.assignment)
    figure.savefig(output)


if __name__ == "__main__":
    main()
