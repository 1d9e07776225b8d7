"""Attention in blocks of queries, for CPUs.

The scores of one block are kept in the processor's cache, forward and (computed again) backward.
Keys that no query of a block sees are not even multiplied: those out of reach by
`max_segment_length`, and in a causal row those that `_far_keys` finds to belong to earlier
segments. Rows with branches go to `tiles`.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp

from prumerge_jax.models.attention import tiles
from prumerge_jax.models.attention.shards import on_shards
from prumerge_jax.sharding.mesh import Axes

QUERY_BLOCK = 128
"""Queries per block."""


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
    """`attention.attend`; on a mesh every device takes its own rows and heads."""
    if segment_ids is not None and branch_ids is not None:
        return tiles.attend(q, k, v, segment_ids, branch_ids, scale=scale, axes=axes)
    run = functools.partial(
        _on_device, causal=causal, max_segment_length=max_segment_length, scale=scale
    )
    return on_shards(run, (q, k, v, segment_ids), (axes, axes, axes, axes[:2]))


def _on_device(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    causal: bool,
    max_segment_length: int | None,
    scale: float,
) -> jax.Array:
    """Row after row, head after head, block after block of queries."""
    length, heads, head_dim = q.shape[1:]
    kv_heads = k.shape[2]
    blocks = list(_seen_keys(length, causal, max_segment_length))

    def row(
        arrays: tuple[jax.Array, jax.Array, jax.Array, jax.Array | None],
    ) -> jax.Array:
        q, k, v, segment_ids = arrays  # [T, H, D], twice [T, K, D], [T]
        masks = [_mask(queries, keys, segment_ids, causal) for queries, keys in blocks]
        ids = segment_ids if causal and max_segment_length is not None else None
        far = [_far_keys(queries, keys, ids) for queries, keys in blocks]

        @jax.checkpoint
        def head(arrays: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            q, k, v = arrays  # [G, T, D], twice [T, D]
            mixed = [
                _seen_block(q[:, queries], k[keys], v[keys], mask, far_keys, scale)
                for (queries, keys), mask, far_keys in zip(blocks, masks, far, strict=True)
            ]
            return jnp.concatenate(mixed, axis=1)

        grouped = q.reshape(length, kv_heads, heads // kv_heads, head_dim).transpose(1, 2, 0, 3)
        mixed = jax.lax.map(head, (grouped, k.swapaxes(0, 1), v.swapaxes(0, 1)))
        return mixed.reshape(heads, length, head_dim).swapaxes(0, 1)

    return jax.lax.map(row, (q, k, v, segment_ids))


def _seen_keys(
    length: int, causal: bool, max_segment_length: int | None
) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, each with the range of keys that its queries can see."""
    reach = length if max_segment_length is None else max_segment_length - 1
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        last = end if causal else min(end + reach, length)
        yield slice(start, end), slice(max(start - reach, 0), last)


class _Far(NamedTuple):
    """The first keys of a block, a block of queries and more away.

    Attributes:
      number: how many they are.
      seen: bool [], whether a query of the block sees one of them.
    """

    number: int
    seen: jax.Array


def _far_keys(queries: slice, keys: slice, segment_ids: jax.Array | None) -> _Far | None:
    """The far keys of a causal block, by the segments of its row [T]; None where there are none.

    Segments in one piece reach back from the block's first query through all keys in between.
    """
    nearest = queries.start - QUERY_BLOCK
    if segment_ids is None or nearest <= keys.start:
        return None
    seen = segment_ids[nearest - 1] == segment_ids[queries.start]
    return _Far(nearest - keys.start, seen)


def _mask(
    queries: slice, keys: slice, segment_ids: jax.Array | None, causal: bool
) -> jax.Array | None:
    """Who sees whom, bool [queries, keys]; None is everyone everyone."""
    mask = None
    if causal:
        at = jnp.arange(queries.start, queries.stop)
        mask = jnp.arange(keys.start, keys.stop) <= at[:, None]
    if segment_ids is not None:
        same = segment_ids[queries, None] == segment_ids[None, keys]
        mask = same if mask is None else mask & same
    return mask


def _seen_block(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    far: _Far | None,
    scale: float,
) -> jax.Array:
    """`_one_block` over all its keys, or without the far ones where none is seen."""
    if far is None:
        return _one_block(q, k, v, mask, scale)
    assert mask is not None  # far keys are known by segments, which are in the mask
    near = slice(far.number, None)
    return jax.lax.cond(
        far.seen,
        lambda: _one_block(q, k, v, mask, scale),
        lambda: _one_block(q, k[near], v[near], mask[:, near], scale),
    )


def _one_block(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, scale: float
) -> jax.Array:
    """q [G, T, D], k and v [S, D], mask [T, S] -> [G, T, D]; every query sees a key."""
    scores = jnp.einsum("gtd,sd->gts", q, k, preferred_element_type=jnp.float32)
    scores = scores * scale
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    highest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - highest)
    mixed = jnp.einsum(
        "gts,sd->gtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return (mixed / weights.sum(-1, keepdims=True)).astype(q.dtype)
