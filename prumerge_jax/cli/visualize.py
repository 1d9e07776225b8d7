"""Draws what a reduction keeps of an image, and what it merges.

prumerge-visualize --checkpoint miniature --image FILE --output kept.png
    [--reduction prumerge:neighbours=8] [--question TEXT]
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from prumerge_jax.cli import command_line


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `prumerge-visualize`."""
    command_line.run(_main, argv)


def _flags() -> flags.FlagValues:
    values = command_line.strings(
        ("checkpoint", None, "model directory, or miniature for the shipped model"),
        ("image", None, "the image"),
        ("reduction", "prumerge", "name of a reduction, with parameters after a colon"),
        ("question", None, "the question, for reductions that read it"),
        ("output", None, "the PNG file to write"),
    )
    flags.DEFINE_integer(
        "dpi", 150, "dots per inch; the image is 19.5 inches wide", 1, 600, flag_values=values
    )
    return values


def _main(argv: Sequence[str]) -> None:
    values = _flags()
    command_line.parse(argv, values, __doc__)
    command_line.require(values, "checkpoint", "image", "output")
    output = pathlib.Path(values.output)
    if output.suffix != ".png":
        raise ValueError(f"--output {output} does not end in .png")
    if not output.parent.is_dir():
        raise ValueError(f"--output {output}: no such folder, create it first")
    # These take seconds to import; a mistyped flag is answered before.
    import prumerge_jax
    from prumerge_jax import reductions
    from prumerge_jax.conversion.miniature import model_directory
    from prumerge_jax.data.images import load_image
    from prumerge_jax.evaluation.report.overlay import overlay

    reduction = reductions.parse(values.reduction)
    image = load_image(values.image)
    model = prumerge_jax.Llava.load(model_directory(values.checkpoint))
    explanation = model.explain(image, reduction=reduction, question=values.question)
    figure = overlay(explanation.pixels, explanation.patch_indices, explanation.assignment)
    figure.savefig(output, dpi=values.dpi)


if __name__ == "__main__":
    main()
