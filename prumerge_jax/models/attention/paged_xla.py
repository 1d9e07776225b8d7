"""Attention to pages in plain XLA: every platform, the reference for the kernels.

The valid pages of all sequences are one list, which a loop takes a few pages at a time. It runs as
long as there are pages, so that a step reads what is valid and little more, whatever the lengths,
in one compiled program. What the softmax of a sequence has summed up is corrected when a higher
score comes, as in flash attention (arXiv 2205.14135).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

PAGES_AT_A_TIME = 8
"""Pages that one turn of the loop takes; up to as many less one are read in vain per step."""
_LOWEST = -1e30
"""In place of minus infinity, whose difference to itself is NaN."""


class _Softmax(NamedTuple):
    """What has been summed up: highest score and norm [B, K, G], weighted values [B, K, G, Dh],
    all float32, for G query heads per key head."""

    highest: jax.Array
    norm: jax.Array
    mixed: jax.Array


class _Block(NamedTuple):
    """Some pages of the list.

    Attributes:
      owner: [N] int32, the sequence of each page.
      page: [N] int32, its number.
      left: [N] int32, how many tokens the sequence has from this page on; 0 for no page.
    """

    owner: jax.Array
    page: jax.Array
    left: jax.Array


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> jax.Array:
    """`attention.attend_to_pages` on one device.

    Args:
      q: [B, H, Dh].
      k, v: [pages, K, page, Dh].
      first: int32 [], first page of the layer.
      tables: [B, M] int32.
      lengths: [B] int32.
      k_scale, v_scale: [pages, K, page], of int8 keys and values.

    Returns:
      [B, H, Dh] float32; zeros for a sequence without tokens.
    """
    (batch, heads, head_dim), (kv_heads, size) = q.shape, k.shape[1:3]
    queries = q.reshape(batch, kv_heads, heads // kv_heads, head_dim)
    counts = -(-lengths // size)
    ends = jnp.cumsum(counts)

    def block(index: jax.Array) -> _Block:
        item = index * PAGES_AT_A_TIME + jnp.arange(PAGES_AT_A_TIME)
        owner = jnp.minimum((ends <= item[:, None]).sum(-1), batch - 1)
        at = item - (ends - counts)[owner]
        left = jnp.where(item < ends[-1], lengths[owner] - at * size, 0)
        return _Block(owner, first + tables[owner, jnp.minimum(at, tables.shape[1] - 1)], left)

    def turn(carry: tuple[jax.Array, _Softmax]) -> tuple[jax.Array, _Softmax]:
        index, so_far = carry
        pages = block(index)
        keys, values = _taken(k, k_scale, pages), _taken(v, v_scale, pages)
        return index + 1, _add(so_far, queries, keys, values, pages)

    shape = queries.shape[:3]
    nothing = _Softmax(jnp.full(shape, _LOWEST), jnp.zeros(shape), jnp.zeros(queries.shape))
    _, total = jax.lax.while_loop(
        lambda carry: carry[0] * PAGES_AT_A_TIME < ends[-1], turn, (jnp.int32(0), nothing)
    )
    mixed = total.mixed / jnp.maximum(total.norm, jnp.finfo(jnp.float32).tiny)[..., None]
    return mixed.reshape(q.shape)


def pages_read(counts: np.ndarray, page_size: int) -> int:
    """Pages that one call of `attend` reads, for sequences of so many [B]."""
    del page_size
    return -(-int(counts.sum()) // PAGES_AT_A_TIME) * PAGES_AT_A_TIME


def _taken(pool: jax.Array, scale: jax.Array | None, block: _Block) -> jax.Array:
    """The block's pages, [N, K, page, Dh]."""
    taken = pool.at[block.page].get(mode="promise_in_bounds")
    if scale is not None:
        of_token = scale.at[block.page].get(mode="promise_in_bounds")
        return taken.astype(jnp.float32) * of_token[..., None]
    # XLA has no product of float16 numbers on CPUs whose sum is float32.
    return taken.astype(jnp.float32) if pool.dtype == jnp.float16 else taken


def _add(
    so_far: _Softmax, queries: jax.Array, keys: jax.Array, values: jax.Array, block: _Block
) -> _Softmax:
    """Adds a block of pages to the softmax of the sequences [B, K, G, Dh] that they belong to."""
    seen = jnp.arange(keys.shape[2]) < block.left[:, None]  # [N, page]
    # Masked values are multiplied by zero, and freed pages may hold anything.
    values = jnp.where(seen[:, None, :, None], values, 0)
    own = queries[block.owner].astype(keys.dtype)
    scores = jnp.einsum("nkgd,nksd->nkgs", own, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(seen[:, None, None], scores * keys.shape[-1] ** -0.5, _LOWEST)
    owned = block.owner[:, None] == jnp.arange(len(queries))  # [N, B]
    of_blocks = jnp.where(owned[..., None, None], scores.max(-1)[:, None], _LOWEST).max(0)
    highest = jnp.maximum(so_far.highest, of_blocks)
    weights = jnp.exp(scores - highest[block.owner][..., None])
    weights = jnp.where(seen[:, None, None], weights, 0)
    mixed = jnp.einsum(
        "nkgs,nksd->nkgd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32
    )
    shrunk = jnp.exp(so_far.highest - highest)
    to_owner = owned.astype(jnp.float32)
    return _Softmax(
        highest,
        so_far.norm * shrunk + jnp.einsum("nb,nkg->bkg", to_owner, weights.sum(-1)),
        so_far.mixed * shrunk[..., None] + jnp.einsum("nb,nkgd->bkgd", to_owner, mixed),
    )
