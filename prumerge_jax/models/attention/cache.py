"""Attention of one new token per sequence to its keys and values in the cache."""

import jax
import jax.numpy as jnp

from prumerge_jax.models.attention.shards import HEADS, on_shards
from prumerge_jax.models.attention.xla import dot_product

HEADS_AT_A_TIME = 8
"""Key heads that `attend_by_products` takes at a time: a tile of a TPU's memory holds as many."""


def attend_by_xla(
    q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array | int, valid: jax.Array
) -> jax.Array:
    """`attention.attend_to_cache` in plain XLA, for the entries valid [B, S].

    Not by cuDNN's kernel on GPUs: it takes complete arrays, and XLA would copy the layer out of
    the cache for it.
    """
    return dot_product(q, k[layer], v[layer], valid[:, None, None, :], causal=False)


def attend_by_products(
    q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array | int, valid: jax.Array
) -> jax.Array:
    """`attend_by_xla` in products that a TPU's matrix unit takes.

    A matrix unit has no use for single queries. So a few heads at a time share one sequence of
    keys, position after position as the cache is stored: each of their queries is multiplied by
    all of it and sees the keys of its head only. Each group of heads slices the cache by itself;
    for a complete layer XLA would make a copy first.
    """
    axes = (HEADS, (None, *HEADS), (None, *HEADS), (), ("batch", None))
    return on_shards(_products, (q, k, v, jnp.asarray(layer), valid), axes)


def _products(
    q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, valid: jax.Array
) -> jax.Array:
    """`attend_by_products` on one device."""
    kv_heads = k.shape[3]
    group = q.shape[2] // kv_heads
    mixed = []
    for first in range(0, kv_heads, HEADS_AT_A_TIME):
        heads = slice(first, min(first + HEADS_AT_A_TIME, kv_heads))
        queries = q[:, 0, heads.start * group : heads.stop * group]
        keys, values = (_part_of_cache(cache, layer, heads) for cache in (k, v))
        mixed.append(_own_heads(queries, keys, values, valid))
    return jnp.concatenate(mixed, axis=1)[:, None]


def _part_of_cache(cache: jax.Array, layer: jax.Array, heads: slice) -> jax.Array:
    """[L, B, S, K, D] -> [B, S, heads, D]."""
    _, batch, length, _, head_dim = cache.shape
    sizes = (1, batch, length, heads.stop - heads.start, head_dim)
    return jax.lax.dynamic_slice(cache, (layer, 0, 0, heads.start, 0), sizes)[0]


def _own_heads(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array) -> jax.Array:
    """q [B, H, D], k and v [B, S, K, D], valid [B, S] -> [B, H, D]."""
    batch, length, kv_heads, head_dim = k.shape
    flat = (batch, length * kv_heads, head_dim)
    scores = jnp.einsum("bhd,btd->bht", q, k.reshape(flat), preferred_element_type=jnp.float32)
    head_of_key = jnp.arange(length * kv_heads) % kv_heads
    head_of_query = jnp.arange(q.shape[1]) // (q.shape[1] // kv_heads)
    own = head_of_query[:, None] == head_of_key
    seen = own & jnp.repeat(valid, kv_heads, axis=1)[:, None]
    weights = jax.nn.softmax(jnp.where(seen, scores * head_dim**-0.5, -jnp.inf), axis=-1)
    mixed = jnp.einsum(
        "bht,btd->bhd", weights.astype(v.dtype), v.reshape(flat), preferred_element_type=jnp.float32
    )
    return mixed.astype(q.dtype)
