"""Merging over time: what stays alike in consecutive frames of a video is one token.

FrameFusion (arXiv 2501.01986), HoliTom (arXiv 2505.21334) and PruneVid (arXiv 2412.16117) compare a
patch with the one at the same place of the frame before and average what is alike. Here that goes
before PruMerge, which sees the averages.

Axes: B frames, those of a video one after the other, N patches, D width of the tower.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from prumerge_jax import selection


class Merged(NamedTuple):
    """Frames whose patches stand for what stays alike after them.

    A tube is a fresh patch and those at its place in the following frames that are not.

    Attributes:
      fresh: [B, N] bool, patches that differ from the ones before, and all of a first frame.
      length: [B, N] int32, patches in the tube that begins here; 0 where none does.
      hidden, keys: [B, N, D] float32, means over tubes; zero where none begins.
      attention: [B, N] float32, likewise.
    """

    fresh: jax.Array
    length: jax.Array
    hidden: jax.Array
    keys: jax.Array
    attention: jax.Array


def similarity(hidden: jax.Array) -> jax.Array:
    """Cosine of every patch and the one at its place in the frame before, [B, N] float32.

    The first frame's are meaningless. A patch without length is similar to nothing: -inf.
    """
    hidden = hidden.astype(jnp.float32)
    before = jnp.roll(hidden, 1, axis=0)
    squares = selection.einsum("bnd,bnd->bn", hidden, hidden)
    product = selection.einsum("bnd,bnd->bn", hidden, before)
    norms = jnp.sqrt(squares * jnp.roll(squares, 1, axis=0))
    return jnp.where(norms > 0, product / jnp.where(norms > 0, norms, 1), -jnp.inf)


def merge_frames(
    hidden: jax.Array, keys: jax.Array, attention: jax.Array, first: jax.Array, tau: float
) -> Merged:
    """Averages patches over the frames in which they stay alike.

    Args:
      hidden: [B, N, D], patch features.
      keys: [B, N, D].
      attention: [B, N] float32.
      first: [B] bool, frames that begin a video. A frame that is not finite is merged with none.
      tau: a patch is alike from this similarity on.
    """
    fresh = ~(similarity(hidden) >= tau) | first[:, None]
    sums = (
        hidden.astype(jnp.float32),
        keys.astype(jnp.float32),
        attention.astype(jnp.float32)[..., None],
        jnp.ones((*fresh.shape, 1), jnp.float32),
    )

    def earlier(
        later: tuple[jax.Array, ...], frame: tuple[jax.Array, tuple[jax.Array, ...]]
    ) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        """From the last frame to the first: the sum so far goes where a tube begins."""
        begins, values = frame
        begins = begins[:, None]
        total = tuple(a + b for a, b in zip(later, values, strict=True))
        here = tuple(jnp.where(begins, each, 0) for each in total)
        return tuple(jnp.where(begins, 0, each) for each in total), here

    nothing = tuple(jnp.zeros_like(each[0]) for each in sums)
    _, (*totals, count) = jax.lax.scan(earlier, nothing, (fresh, sums), reverse=True)
    means = [total / jnp.maximum(count, 1) for total in totals]
    length = count[..., 0].astype(jnp.int32)
    return Merged(fresh, length, means[0], means[1], means[2][..., 0])
