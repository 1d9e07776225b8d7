"""One seam for attention: what may see what is said once, each backend computes it its way.

Backends, by name:

* `xla`: plain XLA, every platform, the reference for the others.
* `blocks`: XLA on CPUs, block after block of queries.
* `cudnn`: NVIDIA GPUs; float16 or bfloat16. Asked for by name, because `None` means XLA to JAX.
* `splash`: TPU; the Pallas kernel.

The cache is for plain XLA everywhere, with products of its own under `splash`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import PartitionSpec

from prumerge_jax import sharding
from prumerge_jax.sharding.mesh import platform

SPLASH_BLOCK = 640
"""Queries, and keys, that `splash` takes at a time, at most."""
_LANES = 128
"""Of a TPU's vector registers; the blocks of `splash` are multiples."""
_XLA_OR_CUDNN: dict[str, Literal["xla", "cudnn"]] = {"xla": "xla", "cudnn": "cudnn"}
Axes = tuple[str | None, ...]
"""Logical names of an array's axes, as in `sharding.RULES`."""
_HEADS: Axes = ("batch", None, "heads", None)
QUERY_BLOCK = 128
"""Queries that `blocks` takes at a time."""
CACHE_HEADS = 8
"""Key heads of the cache that `splash` takes at a time: a tile of a TPU's memory holds as many."""


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    causal: bool = False,
    max_segment_length: int | None = None,
    axes: Axes = _HEADS,
    implementation: str = "xla",
) -> jax.Array:
    """Softmax attention of a sequence with itself, scale 1/sqrt(head width).

    Args:
      q: [B, T, H, D].
      k, v: [B, T, K, D]; K divides H (grouped-query attention).
      segment_ids: [B, T] int32; a query sees only keys of its own segment.
      causal: a query sees only keys at its own index or before.
      max_segment_length: the promise that no segment has more tokens and that each stands in one
        piece. `blocks` and `splash` then leave out keys that are too far away to be seen; the
        others do not look at it.
      axes: logical names of the axes of `q`, `k` and `v`, which say how they lie on a mesh.
      implementation: `xla`, `blocks`, `cudnn` or `splash`.

    Returns:
      [B, T, H, D] in the dtype of `q`.

    Raises:
      ValueError: an unknown implementation.
    """
    all_axes = (axes, axes, axes, axes[:2])
    if implementation == "splash":
        run = functools.partial(_splash, causal=causal, max_segment_length=max_segment_length)
        # The kernel does not declare its varying axes.
        return _on_shards(run, (q, k, v, segment_ids), all_axes, check_vma=False)
    if implementation == "blocks":
        run = functools.partial(_by_blocks, causal=causal, max_segment_length=max_segment_length)
        return _on_shards(run, (q, k, v, segment_ids), all_axes)
    if implementation not in _XLA_OR_CUDNN:
        raise ValueError(
            f"unknown attention {implementation!r}; expected 'xla', 'blocks', 'cudnn' or 'splash'"
        )
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return _dot_product(q, k, v, mask, causal=causal, backend=_XLA_OR_CUDNN[implementation])


def attend_to_cache(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer: jax.Array | int,
    lengths: jax.Array,
    *,
    implementation: str = "xla",
) -> jax.Array:
    """Attention of one new token per sequence to its cache.

    Args:
      q: [B, 1, H, D].
      k, v: [L, B, S, K, D], the cache with the new token's entries already written.
      layer: int32 [], the one whose entries are seen.
      lengths: [B] int32, the number of valid entries. Entries beyond it are never seen, but must
        be finite: masking here would read the whole cache once more at every step.
      implementation: as in `attend`. The form of `splash` is plain XLA in products that a TPU's
        matrix unit takes. The others are `xla`: cuDNN's kernel takes whole arrays, and XLA would
        copy the layer out of the cache for it.

    Returns:
      [B, 1, H, D].
    """
    valid = jnp.arange(k.shape[2]) < lengths[:, None]
    if implementation == "splash":
        axes = (_HEADS, (None, *_HEADS), (None, *_HEADS), (), ("batch", None))
        return _on_shards(_to_cache_by_products, (q, k, v, jnp.asarray(layer), valid), axes)
    mask = valid[:, None, None, :]
    return _dot_product(q, k[layer], v[layer], mask, causal=False, backend="xla")


def default_implementation(dtype: jnp.dtype, head_dim: int) -> str:
    """The fastest backend of the current mesh's platform for heads of this width and dtype."""
    half = dtype in (jnp.bfloat16, jnp.float16)
    if platform() == "gpu" and half and head_dim <= 128 and head_dim % 8 == 0:
        return "cudnn"
    if platform() == "tpu" and head_dim % 64 == 0:
        return "splash"
    return "blocks" if platform() == "cpu" else "xla"


def _dot_product(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    *,
    causal: bool,
    backend: Literal["xla", "cudnn"],
) -> jax.Array:
    dtype = q.dtype
    if dtype == jnp.float16 and backend == "xla" and platform() == "cpu":
        # XLA has no product of float16 numbers there whose sum is float32.
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    seen = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, implementation=backend
    )
    return seen.astype(dtype)


def _on_shards(
    run: Callable[..., jax.Array],
    arrays: Sequence[jax.Array | None],
    axes: Sequence[Axes],
    *,
    check_vma: bool = True,
) -> jax.Array:
    """`run(*arrays)`, on a mesh by every device on its own rows and heads.

    Args:
      run: takes queries, keys and more, returns what lies as its queries.
      arrays: the arguments, whole.
      axes: of each argument.
      check_vma: whether `run` declares its varying axes.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        # Of the keys: query heads divide where theirs do.
        keys = arrays[1]
        assert keys is not None
        entries = dict(zip(axes[1], sharding.divisible_spec(keys.shape, *axes[1]), strict=True))
        specs = tuple(PartitionSpec(*(entries[axis] for axis in names)) for names in axes)
        run = jax.shard_map(run, in_specs=specs, out_specs=specs[0], check_vma=check_vma)
    return run(*arrays)


def _by_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    causal: bool,
    max_segment_length: int | None,
) -> jax.Array:
    """Head after head and block after block of queries, on one device.

    The scores of one block stay in the processor's cache, forward and (computed again) backward,
    and keys that no query of a block sees are not even multiplied: those out of reach by
    `max_segment_length`, and in a causal row those that `_far_keys` finds to belong to earlier
    segments.
    """
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
                _seen_block(q[:, queries], k[keys], v[keys], mask, far_keys)
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
      number: of such keys.
      seen: bool [], whether a query of the block sees one of them.
    """

    number: int
    seen: jax.Array


def _far_keys(queries: slice, keys: slice, segment_ids: jax.Array | None) -> _Far | None:
    """Those of a causal block, by the segments of its row [T]; None where there are none.

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
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None, far: _Far | None
) -> jax.Array:
    """`_one_block` over all its keys, or without the far ones where none is seen."""
    if far is None:
        return _one_block(q, k, v, mask)
    assert mask is not None  # far keys are known by segments, which are in the mask
    near = slice(far.number, None)
    return jax.lax.cond(
        far.seen,
        lambda: _one_block(q, k, v, mask),
        lambda: _one_block(q, k[near], v[near], mask[:, near]),
    )


def _one_block(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None) -> jax.Array:
    """q [G, T, D], k and v [S, D], mask [T, S] -> [G, T, D]; every query sees a key."""
    scores = jnp.einsum("gtd,sd->gts", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    highest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - highest)
    mixed = jnp.einsum(
        "gts,sd->gtd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return (mixed / weights.sum(-1, keepdims=True)).astype(q.dtype)


def _to_cache_by_products(
    q: jax.Array, k: jax.Array, v: jax.Array, layer: jax.Array, valid: jax.Array
) -> jax.Array:
    """`attend_to_cache` on one device, for the entries valid [B, S].

    A matrix unit has no use for single queries. So a few heads at a time share one sequence of
    keys, position after position as the cache lies in memory: each of their queries is multiplied
    with all of it and sees what is of its own head. Every few heads read their part of the cache
    themselves; of a whole layer XLA would first make a copy.
    """
    kv_heads = k.shape[3]
    group = q.shape[2] // kv_heads
    mixed = []
    for first in range(0, kv_heads, CACHE_HEADS):
        heads = slice(first, min(first + CACHE_HEADS, kv_heads))
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


def _splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    causal: bool,
    max_segment_length: int | None,
) -> jax.Array:
    """The kernel on one device's share, with padding behind rows that are no whole blocks."""
    batch, length, heads, head_dim = q.shape
    block, padded = _splash_block(length)
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    behind = ((0, 0), (0, padded - length))
    # Zeros: what is padded sees itself alone, but is multiplied with a weight of zero elsewhere.
    segments = jnp.pad(segment_ids, behind)
    if k.shape[2] != heads:  # the multi-head kernel wants one key head per query head
        k, v = (jnp.repeat(x, heads // k.shape[2], axis=2) for x in (k, v))
    # The kernel takes heads first.
    q, k, v = (jnp.pad(x, (*behind, (0, 0), (0, 0))).swapaxes(1, 2) for x in (q, k, v))
    # Of heads narrower than a register, the tokens fill it.
    layout = splash.QKVLayout.SEQ_MINOR if head_dim % _LANES else splash.QKVLayout.HEAD_DIM_MINOR
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
    )
    kernel = splash.make_splash_mha(
        splash_mask.MultiHeadMask([_splash_mask(padded, causal, max_segment_length)] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=platform() != "tpu",
    )

    def one(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        return kernel(q, k, v, segment_ids=splash.SegmentIds(segments, segments))

    seen = jax.vmap(one)(q * head_dim**-0.5, k, v, segments)
    return seen.swapaxes(1, 2)[:, :length]


def _splash_block(length: int) -> tuple[int, int]:
    """The size of a block, and the length of as few equal ones as hold a row.

    Every block costs the kernel some hundred cycles before it multiplies anything: those of 512 do
    in a fourth of the time what those of 128 do.
    """
    count = -(-length // SPLASH_BLOCK)
    block = -(-length // (count * _LANES)) * _LANES
    return block, count * block


def splash_pairs(length: int, *, causal: bool, max_segment_length: int | None = None) -> int:
    """The pairs of query and key that `splash` multiplies, per row of this length and head.

    They are those of whole blocks, where one query may see one key.
    """
    block, padded = _splash_block(length)
    count = padded // block
    reach = count if max_segment_length is None else (max_segment_length + block - 2) // block
    before = sum(min(index, reach) for index in range(count))
    return (count + (before if causal else 2 * before)) * block**2


def _splash_mask(length: int, causal: bool, max_segment_length: int | None) -> splash_mask.Mask:
    """Who may see whom in a row of this length, whatever its segments."""
    if max_segment_length is not None and max_segment_length < length:
        window = (max_segment_length - 1, 0 if causal else max_segment_length - 1)
        return splash_mask.LocalMask((length, length), window, offset=0)
    if causal:
        return splash_mask.CausalMask((length, length))
    return splash_mask.FullMask((length, length))
