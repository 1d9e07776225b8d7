"""Attention in plain XLA: every platform, the reference for the other backends."""

import jax
import jax.numpy as jnp

from prumerge_jax.models.attention.masks import segment_mask
from prumerge_jax.sharding.mesh import Axes, platform


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    branch_ids: jax.Array | None,
    *,
    causal: bool,
    max_segment_length: int | None,
    scale: float,
    axes: Axes,
) -> jax.Array:
    """`attention.attend`; a mesh splits it as its arguments are split."""
    del max_segment_length, axes
    mask, dtype = segment_mask(segment_ids, branch_ids), q.dtype
    if dtype == jnp.float16 and platform() == "cpu":
        # XLA has no product of float16 numbers there whose sum is float32.
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    attended = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, scale=scale, implementation="xla"
    )
    return attended.astype(dtype)
