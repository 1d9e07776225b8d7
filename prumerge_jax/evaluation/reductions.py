"""Reductions by name, as configs and command lines write them.

`prumerge+`, `full`, ...                     a preset of `prumerge.preset`
`prumerge:neighbours=8,merge=mean`           a preset with parameters overridden
`downsample:8`                               no reduction, the image resized to 8 x 8 patches
"""

import ast
from typing import Any, NamedTuple

from prumerge_jax import prumerge
from prumerge_jax.models.config import VisionConfig


class Reduction(NamedTuple):
    """A reduction and the image size it wants.

    Attributes:
      name: as it was written.
      config: what happens to the tokens.
      image_size: side of the image in pixels.
    """

    name: str
    config: prumerge.PruMergeConfig
    image_size: int


def parse_reduction(name: str, vision: VisionConfig) -> Reduction:
    """Reads a reduction's name.

    Raises:
      ValueError: no such preset or parameter, a value that is not allowed, or a grid larger than
        the tower's.
    """
    preset, _, options = name.partition(":")
    if preset == "downsample":
        if not options.isdigit() or not 1 <= int(options) < vision.grid:
            raise ValueError(
                f"reduction {name!r}: expected 'downsample:G' with G from 1 to {vision.grid - 1}, "
                "the patches along one side"
            )
        return Reduction(name, prumerge.preset("full"), int(options) * vision.patch_size)
    overrides: dict[str, Any] = {}
    for option in filter(None, options.split(",")):
        key, separator, value = option.partition("=")
        if not separator:
            raise ValueError(f"reduction {name!r}: {option!r} is not 'parameter=value'")
        overrides[key] = _value(value)
    try:
        config = prumerge.preset(preset, **overrides)
    except TypeError as error:
        raise ValueError(f"reduction {name!r}: no such parameter: {error}") from error
    return Reduction(name, config, vision.image_size)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
