"""Attention in tiles of queries and keys, for CPUs and rows in which branches share a prefix.

A branch may be far from the prefix that it continues. So a block of queries visits the tiles of
keys of which it sees something, and no other, wherever they are; their softmaxes are joined as in
flash attention (arXiv 2205.14135). How many tiles there are is known at run time alone, which JAX
does not differentiate.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from prumerge_jax.models.attention.masks import causal_mask, segment_mask
from prumerge_jax.models.attention.shards import on_shards
from prumerge_jax.sharding.mesh import Axes

TILE = 128
"""Queries, and keys, of a tile. Of 128 and 256 in either direction this is the fastest on two cores
of a Xeon: 65 ms for a row of 1152 and 16 heads of 64, others 88 to 192."""


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    branch_ids: jax.Array,
    *,
    scale: float,
    axes: Axes,
) -> jax.Array:
    """`attention.attend` of causal rows; on a mesh every device takes its own rows and heads."""
    arrays = (q, k, v, segment_ids, branch_ids)
    # A softmax starts the same on every device, which a loop may not carry on as a device's own.
    run = functools.partial(_on_device, scale=scale)
    return on_shards(run, arrays, (axes, axes, axes, axes[:2], axes[:2]), check_vma=False)


def _on_device(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    branch_ids: jax.Array,
    *,
    scale: float,
) -> jax.Array:
    """Row after row, head after head."""
    length, heads, head_dim = q.shape[1:]
    kv_heads = k.shape[2]
    at_the_end = ((0, 0), (0, -length % TILE))  # segment 0, which attends to itself
    q, k, v = (jnp.pad(x, (*at_the_end, (0, 0), (0, 0))) for x in (q, k, v))
    seen = segment_mask(jnp.pad(segment_ids, at_the_end), jnp.pad(branch_ids, at_the_end))
    assert seen is not None
    padded = q.shape[1]

    def row(arrays: tuple[jax.Array, jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v, seen = arrays  # [T, H, D], twice [T, K, D], [T, T]
        tiles = _seen_tiles(seen & causal_mask(padded))
        grouped = q.reshape(padded, kv_heads, heads // kv_heads, head_dim).transpose(1, 2, 0, 3)
        mixed = jax.lax.map(
            lambda head: _one_head(head[0], head[1], head[2], tiles, scale),
            (grouped, k.swapaxes(0, 1), v.swapaxes(0, 1)),
        )
        return mixed.reshape(heads, padded, head_dim).swapaxes(0, 1)

    return jax.lax.map(row, (q, k, v, seen[:, 0]))[:, :length]


class _Tiles(NamedTuple):
    """The tiles of a row's scores, N in each direction.

    Attributes:
      seen: bool [N, TILE, N, TILE], who sees whom.
      number: int32 [N], tiles of keys of which a block of queries sees something.
      order: int32 [N, N], which they are; the first `number` of each line.
    """

    seen: jax.Array
    number: jax.Array
    order: jax.Array


def _seen_tiles(seen: jax.Array) -> _Tiles:
    """The tiles of a mask, bool [T, T]."""
    blocks = len(seen) // TILE
    split = seen.reshape(blocks, TILE, blocks, TILE)
    some = split.any((1, 3))
    order = jnp.argsort(~some, axis=1, stable=True).astype(jnp.int32)
    return _Tiles(split, some.sum(1, dtype=jnp.int32), order)


class _Softmax(NamedTuple):
    """A sum of values weighted by a softmax over the keys so far, not yet divided.

    Attributes:
      highest: float32 [G, TILE, 1], the highest score.
      total: float32 [G, TILE, 1], sum of the weights.
      mixed: float32 [G, TILE, D], sum of the weighted values.
    """

    highest: jax.Array
    total: jax.Array
    mixed: jax.Array


def _one_head(q: jax.Array, k: jax.Array, v: jax.Array, tiles: _Tiles, scale: float) -> jax.Array:
    """q [G, T, D], k and v [T, D] -> [G, T, D]; every query sees itself at least."""
    group, length, head_dim = q.shape
    key_tiles, value_tiles = (x.reshape(-1, TILE, head_dim) for x in (k, v))

    def block(index: jax.Array) -> jax.Array:
        queries = jax.lax.dynamic_slice_in_dim(q, index * TILE, TILE, axis=1)

        def step(place: jax.Array, softmax: _Softmax) -> _Softmax:
            at = tiles.order[index, place]
            mask = tiles.seen[index, :, at]
            return _joined(softmax, queries, key_tiles[at], value_tiles[at], mask, scale)

        column = jnp.zeros((group, TILE, 1), jnp.float32)
        nothing = _Softmax(column - jnp.inf, column, jnp.zeros(queries.shape, jnp.float32))
        _, total, mixed = jax.lax.fori_loop(0, tiles.number[index], step, nothing)
        return (mixed / total).astype(q.dtype)

    blocks = jax.lax.map(block, jnp.arange(length // TILE))
    return blocks.transpose(1, 0, 2, 3).reshape(group, length, head_dim)


def _joined(
    softmax: _Softmax,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    scale: float,
) -> _Softmax:
    """A softmax with one tile of keys more: q [G, TILE, D], k and v [TILE, D]."""
    scores = jnp.einsum("gtd,sd->gts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores * scale, -jnp.inf)
    highest = jnp.maximum(softmax.highest, scores.max(-1, keepdims=True))
    finite = jnp.where(highest == -jnp.inf, 0, highest)  # a query that has seen no key yet
    weights, before = jnp.exp(scores - finite), jnp.exp(softmax.highest - finite)
    mixed = jnp.einsum(
        "gts,sd->gtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return _Softmax(
        highest,
        softmax.total * before + weights.sum(-1, keepdims=True),
        softmax.mixed * before + mixed,
    )
