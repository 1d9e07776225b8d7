"""Frames of videos between the tower and the reduction."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from prumerge_jax import reductions
from prumerge_jax.prumerge import VisualTokens


@dataclasses.dataclass(frozen=True)
class FrameForm:
    """How frames are encoded, where that differs from images; static under `jax.jit`.

    Attributes:
      pooled: tokens along a side that a frame's patches are pooled to before they are reduced;
        None for all of them.
      cls: whether the last slot of every frame has the tower's CLS feature.
    """

    pooled: int | None = None
    cls: bool = False


def pool_patches(x: jax.Array, pooled: int) -> jax.Array:
    """A square of patches [B, N, ...] shrunk to `pooled` along a side, [B, pooled^2, ...].

    Bilinear between the middles of patches, without antialiasing, as LLaVA-OneVision's pooling of
    projected frames.
    """
    side, batch = math.isqrt(x.shape[1]), x.shape[0]
    square = x.astype(jnp.float32).reshape(batch, side, side, -1)
    shape = (batch, pooled, pooled, square.shape[-1])
    small = jax.image.resize(
        square, shape, "linear", antialias=False, precision=jax.lax.Precision.HIGHEST
    )
    return small.reshape(batch, pooled**2, *x.shape[2:]).astype(x.dtype)


def pool_evidence(
    evidence: reductions.Evidence,
    pooled: int,
    projector: Callable[[jax.Array], jax.Array] | None = None,
) -> reductions.Evidence:
    """What is known of frames of a tower without CLS token, their patches pooled.

    Where patches are known projected, the pooled ones are projected again.
    """
    watched, keys = evidence.watched, evidence.feature_keys
    hidden = pool_patches(evidence.hidden, pooled)
    is_projected = projector is not None and evidence.projected is not None
    return dataclasses.replace(
        evidence,
        hidden=hidden,
        projected=projector(hidden) if is_projected else None,  # type: ignore[misc]
        keys=pool_patches(evidence.keys, pooled),
        attention=pool_patches(evidence.attention, pooled),
        watched=None if watched is None else pool_patches(watched, pooled),
        feature_keys=None if keys is None else pool_patches(keys, pooled),
    )


def with_slots(visual: VisualTokens, slots: int, last: jax.Array | None = None) -> VisualTokens:
    """The tokens in `slots` slots, the added ones empty, but for `last` [B, D] in the last one."""
    more = slots - visual.tokens.shape[1]
    tokens = jnp.pad(visual.tokens, ((0, 0), (0, more), (0, 0)))
    if last is not None:
        of_tokens = tokens.shape[-1] - last.shape[-1]  # a weight of one patch is the logarithm 0
        tokens = tokens.at[:, -1].set(jnp.pad(last, ((0, 0), (0, of_tokens))).astype(tokens.dtype))
    patches = jnp.pad(visual.patch_indices, ((0, 0), (0, more)), constant_values=-1)
    return visual._replace(tokens=tokens, patch_indices=patches)
