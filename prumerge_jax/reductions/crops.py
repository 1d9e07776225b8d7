"""HiRED (arXiv 2408.10945): an image's tokens shared out over its crops by attention.

Axes: B batch, C crops of an image, the whole image first, N patches of each, R capacity.
"""

import dataclasses
from typing import Annotated

import jax.numpy as jnp
import numpy as np

from prumerge_jax.options import Bounds
from prumerge_jax.prumerge import VisualTokens
from prumerge_jax.reductions.base import Evidence, Reduction, kept_rows
from prumerge_jax.reductions.registry import register
from prumerge_jax.reductions.set_rules import MOST_TOKENS, Top


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hired(Top):
    """The most attended patches of every crop, `tokens` per crop on average.

    The number of an image's tokens is C `tokens`. They are shared out over its crops by
    `crop_shares`; an image that is one crop keeps them all.

    Attributes:
      alpha: share of the tokens that the whole image gets, and share of its patches that do not
        count as content.
    """

    alpha: Annotated[float, Bounds(0.0, 1.0)] = 0.5

    @property
    def takes_several_crops(self) -> bool:
        """Whether the tokens are of a fixed number and unmerged: what an adaptive count of an image
        would be HiRED does not say, and merging would have to wait for the shares."""
        return not self.varying and self.merge == "none"

    def for_crops(self, most: int) -> Reduction:
        """With room for the shares of the crops."""
        if most == 1 or not self.takes_several_crops:
            return self
        return HiredCrops(tokens=self.tokens, alpha=self.alpha, most_crops=most)

    def crop_shares(self, content: np.ndarray, tile: np.ndarray, num_crops: int) -> np.ndarray:
        """`crop_shares` of C `tokens`."""
        if num_crops == 1:
            return np.minimum([self.tokens], content.size)
        return crop_shares(
            content, tile, num_crops, total=num_crops * self.tokens, alpha=self.alpha
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiredCrops(Hired):
    """`Hired` on images of up to `most_crops` crops, see `Reduction.for_crops`.

    Attributes:
      most_crops: the largest C.
    """

    most_crops: Annotated[int, Bounds(2, MOST_TOKENS)] = 2

    @property
    def needs(self) -> frozenset[str]:
        """The attention of the first layer too."""
        return super().needs | {"first_attention"}

    @property
    def raster_order(self) -> bool:
        """False: the order of a crop's tokens is that of their attention."""
        return False

    def for_crops(self, most: int) -> Reduction:
        """Itself."""
        return self

    def capacity_for(self, num_patches: int) -> int:
        """R: the largest share of a crop, that of an image all of whose content is in one tile."""
        most = self.tokens
        for crops in range(2, self.most_crops + 1):
            whole = _of_whole_image(crops * self.tokens, self.alpha, num_patches)
            most = max(most, whole, crops * self.tokens - whole)
        return min(most, num_patches)

    def reduce(self, evidence: Evidence) -> VisualTokens:
        """The most attended patches, by descending attention, and the first layer's attention."""
        steps = self.capacity_for(evidence.hidden.shape[1])
        order, evidence, available = self.rank(evidence, steps)
        required = jnp.minimum(available, steps)
        patches = jnp.where(jnp.arange(steps) < required[:, None], order.patches, -1)
        visual = kept_rows(evidence.hidden, patches, required)
        return visual._replace(content=evidence.first_attention)


def crop_shares(
    content: np.ndarray, tile: np.ndarray, num_crops: int, *, total: int, alpha: float
) -> np.ndarray:
    """How many patches each crop of an image keeps, int [C].

    The whole image gets the share `alpha` of them all. The others are shared out over the tiles by
    how many of the whole image's content lie in the part of each: of its patches the share
    1 - `alpha` with most attention from CLS in the first layer, summed over heads.

    Args:
      content: [N] float32, that attention.
      tile: int [N], the crop, from 1, whose part of the whole image every patch lies in.
      num_crops: C, at least 2.
      total: patches kept of all crops together. Up to one per tile is lost to truncation, as in the
        authors' code, and those beyond the N of a crop.
      alpha: see above.
    """
    whole = _of_whole_image(total, alpha, content.size)
    largest = np.argsort(-content, kind="stable")[: int(content.size * (1 - alpha))]
    counts = np.bincount(tile[largest], minlength=num_crops)[1:]
    shares = counts * (total - whole) // max(counts.sum(), 1)
    return np.minimum([whole, *shares], content.size)


def _of_whole_image(total: int, alpha: float, num_patches: int) -> int:
    return min(int(total * alpha), num_patches)


register("hired", Hired)
