"""A bias per key as further columns of queries and keys, which every backend takes as they are.

A query gets ones and a key its bias there, so that their product has the bias added. The bias is
split into parts that each fit the dtype, so that it is as exact in bfloat16 as the logits.
"""

import math

import jax
import jax.numpy as jnp

PARTS = 3
"""Summands of a bias: three numbers of bfloat16 have the digits of one of float32."""
MULTIPLE = 8
"""Heads are widened to a multiple of this, as kernels want them."""


def widened(head_dim: int) -> int:
    """Width of heads with room for a bias."""
    return -(-(head_dim + PARTS) // MULTIPLE) * MULTIPLE


def with_columns(
    q: jax.Array, k: jax.Array, v: jax.Array, key_bias: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values whose plain attention is that with the bias; cut it back to D.

    Args:
      q: [B, T, H, D].
      k, v: [B, S, K, D].
      key_bias: [B, S] float32, added to the logits of every query.
    """
    head_dim = q.shape[-1]
    more = widened(head_dim) - head_dim
    # The backend divides by the root of the new width.
    scale = math.sqrt(widened(head_dim))
    ones = jnp.ones((*q.shape[:-1], PARTS), q.dtype)
    q = (q.astype(jnp.float32) * (scale / math.sqrt(head_dim))).astype(q.dtype)
    parts, rest = [], key_bias.astype(jnp.float32) * scale
    for _ in range(PARTS):
        part = rest.astype(k.dtype)
        parts.append(part)
        rest = rest - part.astype(jnp.float32)
    columns = jnp.stack(parts, axis=-1)[:, :, None]
    columns = jnp.broadcast_to(columns, (*k.shape[:-1], PARTS))

    def padded(x: jax.Array, columns: jax.Array) -> jax.Array:
        zeros = jnp.zeros((*x.shape[:-1], more - PARTS), x.dtype)
        return jnp.concatenate([x, columns, zeros], axis=-1)

    no_values = jnp.zeros((*v.shape[:-1], PARTS), v.dtype)
    return padded(q, ones), padded(k, columns), padded(v, no_values)
