"""Keys and values in pages, and the attention of one new token per sequence to its own.

A sequence has a page for every `page_size` tokens, wherever there was a free one; its row of the
page table lists them in order. A pool holds the pages of all layers: page p of layer l is page
`l * P + p` of the arrays, P being the pages of one layer, so that a layer's are read where they
lie. On a mesh every data shard has a pool of its own and numbers its pages from 0; a sequence's
pages are on its own shard, so that no page travels.

Forms of attention, one file each: `paged_xla` for every platform, `paged_kernels` for TPUs and
GPUs. Each stores pages as it reads them best.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from prumerge_jax.models import tuning
from prumerge_jax.models.attention import paged_kernels, paged_xla
from prumerge_jax.models.attention.key_bias import widened
from prumerge_jax.models.attention.shards import HEADS, on_shards
from prumerge_jax.models.config import TextConfig
from prumerge_jax.sharding.mesh import Axes, divisible_spec, logical_spec


class KVPages(NamedTuple):
    """Keys and values of all layers in pages; keys are rotated already.

    Every number is finite: `write_to_pages` sees to it, since a kernel multiplies what it masks by
    zero, and 0 * NaN is NaN.

    Attributes:
      k, v: [L * P, K, page, Dh], or [K, L * P, page, Dh] where a kernel reads them (`heads_first`).
        int8 where every token and head has a scale.
      k_scale, v_scale: [L * P, K, page] float32, those scales; None without.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None


class _Form(NamedTuple):
    """A form of attention to pages.

    Attributes:
      attend: (queries [B, H, Dh], keys, values, first page of the layer, table, lengths) -> [B, H,
        Dh], on one device; `xla` also takes their scales.
      heads_first: whether pages are stored as [K, L * P, page, Dh].
      takes: whether it takes heads of this dtype and width.
      pages_read: (pages of each sequence [B], page size) -> number of pages that it reads for them.
    """

    attend: Callable[..., jax.Array]
    heads_first: bool
    takes: Callable[[jnp.dtype, int], bool]
    pages_read: Callable[[np.ndarray, int], int]


_FORMS = {
    "xla": _Form(paged_xla.attend, False, lambda dtype, head_dim: True, paged_xla.pages_read),
    "paged_tpu": _Form(
        paged_kernels.attend_on_tpu, True, paged_kernels.tpu_takes, paged_kernels.pages_read
    ),
    "paged_gpu": _Form(
        paged_kernels.attend_on_gpu, True, paged_kernels.gpu_takes, paged_kernels.pages_read
    ),
}
_PAGES_FIRST: Axes = ("batch", "heads", None, None)
_HEADS_FIRST: Axes = ("heads", "batch", None, None)


def form_for(dtype: jnp.dtype, head_dim: int) -> str:
    """The form for heads of this dtype and width: the tuning's if it takes them, else `xla`."""
    preferred = tuning.current().cache_attention
    return preferred if _FORMS[preferred].takes(dtype, head_dim) else "xla"


def tokens_read(lengths: np.ndarray, page_size: int, dtype: jnp.dtype, head_dim: int) -> int:
    """Tokens whose keys and values a step reads in every layer, for sequences of these lengths."""
    counts = -(-lengths // page_size)
    return page_size * _form(dtype, head_dim, None).pages_read(counts, page_size)


def empty_pages(
    config: TextConfig,
    pages: int,
    page_size: int,
    dtype: jnp.dtype,
    *,
    key_bias: bool = False,
    implementation: str | None = None,
) -> KVPages:
    """A pool of zeros: `pages` pages in every layer, on a mesh over all its data shards; with room
    for a bias of every key (`key_bias.py`). A `dtype` of int8 adds scales.

    Raises:
      ValueError: int8 with biases, which have no bits of their own in a head's scale.
    """
    if key_bias and dtype == jnp.int8:
        raise ValueError(
            "int8 keys and values take no tokens that count several times (merge=mean); leave "
            "cache_dtype out"
        )
    head_dim = widened(config.head_dim) if key_bias else config.head_dim
    form = _form(dtype, head_dim, implementation)
    count, heads = config.num_layers * pages, config.num_kv_heads
    leading = (heads, count) if form.heads_first else (count, heads)
    zeros = jnp.zeros((*leading, page_size, head_dim), dtype)
    scales = jnp.zeros((*leading, page_size)) if dtype == jnp.int8 else None
    return over_shards(KVPages(zeros, zeros, scales, scales), implementation=implementation)


def pages_spec(config: TextConfig, dtype: jnp.dtype) -> PartitionSpec:
    """How the current mesh splits a pool for these heads; its pages divide over the data shards."""
    form = _form(dtype, config.head_dim, None)
    heads = divisible_spec((config.num_kv_heads,), "heads")[0]
    pages = logical_spec("batch")[0]
    return PartitionSpec(heads, pages) if form.heads_first else PartitionSpec(pages, heads)


def over_shards(pages: KVPages, *, implementation: str | None = None) -> KVPages:
    """The pool laid out over the current mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return pages
    axes = _axes(_form(pages.k.dtype, pages.k.shape[-1], implementation))
    spec = divisible_spec(pages.k.shape, *axes)

    def placed(x: jax.Array) -> jax.Array:  # scales have an axis less
        return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec[: x.ndim]))

    return jax.tree.map(placed, pages)


def write_to_pages(
    pages: KVPages,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array | int,
    num_layers: int,
    places: jax.Array,
    *,
    implementation: str | None = None,
) -> KVPages:
    """Writes new keys and values, token by token.

    Args:
      pages: the pool.
      k, v: [B, T, K, Dh], rotated keys, and values.
      layer: int32 [], whose they are.
      num_layers: L.
      places: [B, T] int32, `page * page_size + offset` of every token in the pool of its own data
        shard; -1 writes nothing.
    """
    form = _form(pages.k.dtype, k.shape[-1], implementation)
    axes = _axes(form)

    def write(pool: jax.Array, new: jax.Array, places: jax.Array, layer: jax.Array) -> jax.Array:
        count = pool.shape[1 if form.heads_first else 0]
        places = places.reshape(-1)
        page, offset = jnp.divmod(places, pool.shape[2])
        # Beyond the last page, where writes are dropped.
        page = jnp.where(places >= 0, page + layer * (count // num_layers), count)
        new = new.reshape(-1, *new.shape[2:]).astype(pool.dtype)
        new = jnp.where(jnp.isfinite(new), new, 0)
        if form.heads_first:
            rows = pool.reshape(-1, pool.shape[-1])
            rows = rows.at[_rows_of(pool, page, offset)].set(new, mode="drop")
            return rows.reshape(pool.shape)
        return pool.at[page, :, offset].set(new, mode="drop")

    index = jnp.asarray(layer)

    def written(pool: jax.Array, new: jax.Array) -> jax.Array:
        all_axes = (axes[: pool.ndim], HEADS[: new.ndim], HEADS[:2], ())
        return on_shards(write, (pool, new, places, index), all_axes, check_vma=False)

    if pages.k_scale is None or pages.v_scale is None:
        return KVPages(written(pages.k, k), written(pages.v, v))
    (k, k_scale), (v, v_scale) = _rounded(k), _rounded(v)
    return KVPages(
        written(pages.k, k),
        written(pages.v, v),
        written(pages.k_scale, k_scale),
        written(pages.v_scale, v_scale),
    )


def _rounded(new: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys or values [B, T, K, Dh] as int8, and the scale of every token and head [B, T, K]."""
    new = jnp.where(jnp.isfinite(new), new, 0).astype(jnp.float32)
    largest = jnp.abs(new).max(-1)
    scale = jnp.where(largest > 0, largest / 127, 1)
    return jnp.round(new / scale[..., None]).astype(jnp.int8), scale


def _rows_of(pool: jax.Array, page: jax.Array, offset: jax.Array) -> jax.Array:
    """Rows [N, K] of a pool [K, pages, page, Dh] of rows Dh; beyond the last one for other pages.

    What is scattered behind the heads makes XLA lay out all of the pool anew, on TPUs.
    """
    heads, count, size = pool.shape[:3]
    row = (jnp.arange(heads) * count + page[:, None]) * size + offset[:, None]
    return jnp.where((page < count)[:, None], row, heads * count * size)


def copy_in_pages(
    pages: KVPages,
    source: jax.Array,
    target: jax.Array,
    num_layers: int,
    *,
    implementation: str | None = None,
) -> KVPages:
    """Copies keys and values of all layers, token by token.

    Args:
      pages: the pool.
      source, target: [shards, N] int32, places of each data shard as in `write_to_pages`; a target
        of -1 copies nothing. No place is both.
      num_layers: L.
    """
    form = _form(pages.k.dtype, pages.k.shape[-1], implementation)
    axes = _axes(form)

    def copy(pool: jax.Array, _: jax.Array, source: jax.Array, target: jax.Array) -> jax.Array:
        count = pool.shape[1 if form.heads_first else 0]
        (page, offset), (to_page, to_offset) = (
            jnp.divmod(places.reshape(-1), pool.shape[2]) for places in (source, target)
        )

        def of_layer(layer: jax.Array, pool: jax.Array) -> jax.Array:
            first = layer * (count // num_layers)
            # Beyond the last page, where writes are dropped.
            at = jnp.where(target.reshape(-1) >= 0, to_page + first, count)
            if form.heads_first:
                rows = pool.reshape(-1, pool.shape[-1])
                tokens = rows[_rows_of(pool, page + first, offset)]
                rows = rows.at[_rows_of(pool, at, to_offset)].set(tokens, mode="drop")
                return rows.reshape(pool.shape)
            return pool.at[at, :, to_offset].set(pool[page + first, :, offset], mode="drop")

        return jax.lax.fori_loop(0, num_layers, of_layer, pool)

    # The second argument is what `on_shards` reads the split from.
    def copied(pool: jax.Array) -> jax.Array:
        own = axes[: pool.ndim]
        all_axes = (own, own, HEADS[:2], HEADS[:2])
        return on_shards(copy, (pool, pool, source, target), all_axes, check_vma=False)

    return jax.tree.map(copied, pages)


def attend_to_pages(
    q: jax.Array,
    pages: KVPages,
    layer: jax.Array | int,
    num_layers: int,
    tables: jax.Array,
    lengths: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of one new token per sequence to its keys and values.

    Args:
      q: [B, 1, H, Dh].
      pages: the pool, with the new token's keys and values already written.
      layer: int32 [], the one whose pages are seen.
      num_layers: L.
      tables: [B, M] int32, the pages of each sequence in order; any page beyond its length.
      lengths: [B] int32, valid tokens of each sequence; 0 sees nothing, and what comes out there
        is of no meaning.
      implementation: `xla`, `paged_tpu` or `paged_gpu`; by default `form_for` these heads.

    Returns:
      [B, 1, H, Dh] in the dtype of `q`.

    Raises:
      ValueError: an unknown implementation.
    """
    form = _form(pages.k.dtype, q.shape[-1], implementation)
    axes = _axes(form)

    def run(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        tables: jax.Array,
        lengths: jax.Array,
        layer: jax.Array,
        *scales: jax.Array,
    ) -> jax.Array:
        first = layer * (k.shape[1 if form.heads_first else 0] // num_layers)
        attended = form.attend(q[:, 0], k, v, first, tables, lengths, *scales)
        return attended[:, None].astype(q.dtype)

    scales = [scale for scale in (pages.k_scale, pages.v_scale) if scale is not None]
    all_axes = (HEADS, axes, axes, HEADS[:2], HEADS[:1], (), *(axes[:3] for _ in scales))
    arrays = (q, pages.k, pages.v, tables, lengths, jnp.asarray(layer), *scales)
    return on_shards(run, arrays, all_axes, check_vma=False)


@functools.cache
def _axes(form: _Form) -> Axes:
    return _HEADS_FIRST if form.heads_first else _PAGES_FIRST


def _form(dtype: jnp.dtype, head_dim: int, implementation: str | None) -> _Form:
    name = implementation or form_for(dtype, head_dim)
    if name not in _FORMS:
        raise ValueError(
            f"unknown attention to pages {name!r:.80}; expected one of {sorted(_FORMS)}"
        )
    return _FORMS[name]
