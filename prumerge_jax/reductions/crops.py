"""HiRED (arXiv 2408.10945): a budget shared out over the crops of an image by attention.

Axes: C crops, the whole image first, N patches of each.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp

from prumerge_jax import selection
from prumerge_jax.reductions.registry import register
from prumerge_jax.reductions.set_rules import Top


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hired(Top):
    """The most attended patches: what HiRED keeps of an image that is one crop.

    An image of several crops would share its budget out by `crop_budgets`, for which the engine
    does not gather the first layer's attention; it is refused.
    """

    @property
    def takes_several_crops(self) -> bool:
        """False: its crops are not reduced each alone."""
        return False


def crop_budgets(
    first_layer: jax.Array,
    sub_images: tuple[int, int],
    *,
    total: int,
    alpha: float = 0.5,
    pieces: Literal["quadrants", "raster"] = "quadrants",
) -> jax.Array:
    """How many patches each crop of every image keeps.

    Args:
      first_layer: [B, N] float32, attention of CLS in the first layer over the whole image, summed
        over heads.
      sub_images: rows and columns of crops that follow the whole image.
      total: patches kept of all crops together.
      alpha: share of the budget that the whole image gets, and share of its patches that do not
        count as content.
      pieces: which part of the whole image a sub-image stands for: the `quadrants` of the paper's
        text, or consecutive pieces of the `raster` as in the authors' code.

    Returns:
      [B, 1 + rows * columns] int32; up to one patch per sub-image is lost to truncation, as in the
      authors' code.

    Raises:
      ValueError: quadrants of an image that is no square grid.
    """
    batch, num_patches = first_layer.shape
    rows, columns = sub_images
    whole = min(int(total * alpha), num_patches)
    content = selection.descending_rank(first_layer) < int(num_patches * (1 - alpha))
    piece = _piece_of(num_patches, rows, columns, pieces)
    counts = jnp.stack([(content & (piece == i)).sum(-1) for i in range(rows * columns)], axis=-1)
    shares = counts * (total - whole) // jnp.maximum(counts.sum(-1, keepdims=True), 1)
    whole_image = jnp.full((batch, 1), whole)
    return jnp.concatenate([whole_image, jnp.minimum(shares, num_patches)], -1).astype(jnp.int32)


def _piece_of(num_patches: int, rows: int, columns: int, pieces: str) -> jax.Array:
    """Number of the sub-image that every patch of the whole image belongs to, [N] int32."""
    patch, count = jnp.arange(num_patches), rows * columns
    if pieces == "raster":
        return jnp.minimum(patch // (num_patches // count), count - 1)
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(f"quadrants need a square grid; got {num_patches} patches")
    return (patch // side * rows // side) * columns + patch % side * columns // side


def most_attended(attention: jax.Array, budgets: jax.Array) -> jax.Array:
    """The patches that each crop keeps: attention [B, C, N], budgets [B, C] -> [B, C, N] bool."""
    return jax.vmap(selection.descending_rank)(attention) < budgets[..., None]


register("hired", Hired)
