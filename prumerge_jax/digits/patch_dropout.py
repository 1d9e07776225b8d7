"""Patch dropout: training shows a part of some pictures (PatchDropout, arXiv 2208.07220).

A small decoder that has only ever seen all patches leans on those without content, and stumbles
when a reduction takes them away. One that has seen random parts does not.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from prumerge_jax.prumerge import VisualTokens

_MULTIPLIER = np.uint32(2_654_435_761)  # Knuth's, 2^32 over the golden ratio


@dataclasses.dataclass(frozen=True)
class PatchDropout:
    """Which pictures lose how much.

    Attributes:
      pictures: share of the pictures that lose tokens.
      least: share of its tokens that such a picture keeps at least; drawn evenly from here to 1.
    """

    pictures: float
    least: float

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if not 0 <= value <= 1:
                raise ValueError(f"patch_dropout.{name} is {value}; expected 0 to 1")


def drop_patches(visual: VisualTokens, pixels: jax.Array, dropout: PatchDropout) -> VisualTokens:
    """Leaves out random tokens of random pictures; the others keep their order.

    The draw is seeded by the pixels: batch mates play no part, and a resumed run draws the same.

    Args:
      visual: tokens of B images, capacity R.
      pixels: [B, S, S, 3] uint8, the images.
      dropout: how many.
    """
    keep = jax.vmap(lambda image, length: _keep(image, length, visual.tokens.shape[1], dropout))(
        pixels, visual.lengths
    )
    first_kept = jnp.argsort(~keep, axis=-1, stable=True)
    tokens = jnp.take_along_axis(visual.tokens, first_kept[..., None], axis=1)
    patches = jnp.take_along_axis(visual.patch_indices, first_kept, axis=1)
    lengths = keep.sum(-1, dtype=jnp.int32)
    valid = jnp.arange(keep.shape[1]) < lengths[:, None]
    return visual._replace(
        tokens=jnp.where(valid[..., None], tokens, 0),
        lengths=lengths,
        patch_indices=jnp.where(valid, patches, -1),
    )


def _keep(image: jax.Array, length: jax.Array, capacity: int, dropout: PatchDropout) -> jax.Array:
    """[R] bool: which of the first `length` tokens stay; one at least."""
    values = image.ravel().astype(jnp.uint32)
    hashed = (values * (jnp.arange(values.size, dtype=jnp.uint32) * _MULTIPLIER)).sum()
    picked, share, order = jax.random.split(jax.random.key(hashed), 3)
    drawn = length * jax.random.uniform(share, minval=dropout.least)
    number = jnp.maximum(jnp.round(drawn).astype(jnp.int32), 1)
    number = jnp.where(jax.random.uniform(picked) < dropout.pictures, number, length)
    valid = jnp.arange(capacity) < length
    score = jnp.where(valid, jax.random.uniform(order, (capacity,)), 2.0)
    rank = jnp.argsort(jnp.argsort(score))
    return (rank < number) & valid
