"""No reduction of tokens, but a smaller image: the plainest way to fewer of them."""

import dataclasses
from typing import Annotated

from prumerge_jax import prumerge
from prumerge_jax.options import Bounds, check
from prumerge_jax.prumerge import VisualTokens
from prumerge_jax.reductions.base import Evidence, Reduction
from prumerge_jax.reductions.registry import register


@dataclasses.dataclass(frozen=True)
class Downsample(Reduction):
    """Every patch of an image that is resized to `grid` x `grid` patches.

    Attributes:
      grid: patches along a side.
    """

    grid: Annotated[int, Bounds(1, 256)]

    def __post_init__(self) -> None:
        check(self)

    @property
    def selects_patches(self) -> bool:
        """False: all patches of the smaller image are kept."""
        return False

    def capacity_for(self, num_patches: int) -> int:
        """R: all patches."""
        return num_patches

    def image_size(self, image_size: int, patch_size: int) -> int:
        """Side in pixels of the resized image.

        Raises:
          ValueError: the tower's native image has no more patches than that.
        """
        own = image_size // patch_size
        if self.grid >= own:
            raise ValueError(
                f"downsample:{self.grid}: expected a grid from 1 to {own - 1}, the tower's images "
                f"have {own} x {own} patches"
            )
        return self.grid * patch_size

    def reduce(self, evidence: Evidence) -> VisualTokens:
        """All patches in raster order."""
        return prumerge.reduce_tokens(
            evidence.hidden, evidence.keys, evidence.attention, prumerge.preset("full")
        )


register("downsample", Downsample, shorthand="grid")
