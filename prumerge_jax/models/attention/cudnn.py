"""Attention by cuDNN's fused kernel, on NVIDIA GPUs."""

import jax
import jax.numpy as jnp

from prumerge_jax.models.attention.masks import segment_mask
from prumerge_jax.sharding.mesh import Axes


def takes(dtype: jnp.dtype, head_dim: int) -> bool:
    """Whether the kernel takes heads of this width and dtype."""
    return dtype in (jnp.bfloat16, jnp.float16) and head_dim <= 128 and head_dim % 8 == 0


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
    """`attention.attend`; asked for by name, because `None` means XLA to JAX."""
    del max_segment_length, axes
    mask = segment_mask(segment_ids, branch_ids)
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, scale=scale, implementation="cudnn"
    )
