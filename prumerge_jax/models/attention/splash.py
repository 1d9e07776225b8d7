"""Attention by the Pallas kernel of TPUs (splash attention), padded to full blocks."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from prumerge_jax.models.attention.shards import on_shards
from prumerge_jax.models.remat import ATTENTION
from prumerge_jax.sharding.mesh import Axes, platform

MAX_BLOCK = 640
"""Queries, and keys, per block at most."""
NARROWEST = 64
"""Width of heads from which on the kernel is used: half of what a product takes in at a time."""
_LANES = 128
"""TPU lane count; block sizes must be multiples."""
_SUBLANES = 8
"""Rows of a vector register, as which the kernel holds narrow heads."""


def takes(dtype: jnp.dtype, head_dim: int) -> bool:
    """Whether the kernel takes heads of this width and dtype."""
    del dtype
    return head_dim >= NARROWEST and head_dim % _SUBLANES == 0


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
    """`attention.attend`; on a mesh every device runs the kernel on its own rows and heads."""
    run = functools.partial(
        _on_device, causal=causal, max_segment_length=max_segment_length, scale=scale
    )
    arrays = (q, k, v, segment_ids, branch_ids)
    # The kernel does not declare its varying axes.
    return on_shards(run, arrays, (axes, axes, axes, axes[:2], axes[:2]), check_vma=False)


def splash_pairs(length: int, *, causal: bool, max_segment_length: int | None = None) -> int:
    """Number of query-key pairs that the kernel multiplies per head, in a row of this length.

    All pairs of a block count as soon as one query in it may see one key.
    """
    block, padded = block_sizes(length)
    count = padded // block
    reach = count if max_segment_length is None else (max_segment_length + block - 2) // block
    before = sum(min(index, reach) for index in range(count))
    return (count + (before if causal else 2 * before)) * block**2


def block_sizes(length: int) -> tuple[int, int]:
    """The block size, and the padded length: that of the fewest equal blocks that hold a row.

    Every block costs the kernel some hundred cycles before it multiplies anything: blocks of
    512 take a quarter of the time of blocks of 128.
    """
    count = -(-length // MAX_BLOCK)
    block = -(-length // (count * _LANES)) * _LANES
    return block, count * block


def _on_device(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    branch_ids: jax.Array | None,
    *,
    causal: bool,
    max_segment_length: int | None,
    scale: float,
) -> jax.Array:
    """The kernel on one device's share; rows that do not fill their blocks are padded."""
    batch, length, heads, head_dim = q.shape
    block, padded = block_sizes(length)
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    at_the_end = ((0, 0), (0, padded - length))
    # Segment 0: padding attends to itself alone; elsewhere its values get a weight of zero.
    segments = jnp.pad(segment_ids, at_the_end)
    if k.shape[2] != heads:  # the multi-head kernel wants one key head per query head
        k, v = (jnp.repeat(x, heads // k.shape[2], axis=2) for x in (k, v))
    # The kernel takes heads first.
    q, k, v = (jnp.pad(x, (*at_the_end, (0, 0), (0, 0))).swapaxes(1, 2) for x in (q, k, v))
    heads_first = (q if scale == 1 else q * scale, k, v)
    near = _mask(padded, causal, max_segment_length)
    if branch_ids is None:
        ids = splash.SegmentIds(segments, segments)
        attended = _kernel(near, heads, head_dim, block)(*heads_first, ids)
    else:
        attended = _with_prefixes(
            heads_first, near, segments, jnp.pad(branch_ids, at_the_end), block
        )
    return attended.swapaxes(1, 2)[:, :length]


def _with_prefixes(
    heads_first: tuple[jax.Array, jax.Array, jax.Array],
    near: splash_mask.Mask,
    segments: jax.Array,
    branches: jax.Array,
    block: int,
) -> jax.Array:
    """Two softmaxes, joined by the logarithms of their sums: over a query's own branch, and over
    the prefix, which may be out of reach of `near`.

    Args:
      heads_first: queries, scaled, keys and values [B, H, T, D].
      near: who may see whom of one branch.
      segments, branches: [B, T] int32.
      block: queries, and keys, per block.

    Returns:
      [B, H, T, D].
    """
    heads, length, head_dim = heads_first[0].shape[1:]
    own = segments * (length + 1) + branches
    # Numbers apart are those that see no prefix, and those that are in none.
    to_prefix = splash.SegmentIds(
        jnp.where(branches > 0, segments, -1), jnp.where(branches == 0, segments, -2)
    )
    parts = []
    for mask, ids in (
        (near, splash.SegmentIds(own, own)),
        (splash_mask.CausalMask((length, length)), to_prefix),
    ):
        kernel = _kernel(mask, heads, head_dim, block, save_residuals=True)
        attended, (log_sum,) = kernel(*heads_first, ids)
        parts.append((attended.astype(jnp.float32), log_sum[..., None]))
    (attended, log_sum), (to_prefix_attended, prefix_log_sum) = parts
    # Where there is no prefix its logarithm is the kernel's most negative number, and this zero.
    share = jax.nn.sigmoid(prefix_log_sum - log_sum)
    joined = attended * (1 - share) + to_prefix_attended * share
    return joined.astype(heads_first[0].dtype)


def _kernel(
    mask: splash_mask.Mask, heads: int, head_dim: int, block: int, *, save_residuals: bool = False
) -> Callable[..., Any]:
    """The kernel over a batch: queries, keys and values [B, H, T, D] and segment ids [B, T]."""
    kernel = splash.make_splash_mha(
        splash_mask.MultiHeadMask([mask] * heads),
        block_sizes=_blocks(block, head_dim),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=save_residuals,
        residual_checkpoint_name=ATTENTION,
        interpret=platform() != "tpu",
    )

    def one(q: jax.Array, k: jax.Array, v: jax.Array, ids: splash.SegmentIds) -> Any:
        return kernel(q, k, v, segment_ids=ids)

    return jax.vmap(one)


def _blocks(block: int, head_dim: int) -> splash.BlockSizes:
    """The kernel's blocks, forward and backward."""
    # Tokens fill a vector register; narrow heads do not.
    layout = splash.QKVLayout.SEQ_MINOR if head_dim % _LANES else splash.QKVLayout.HEAD_DIM_MINOR
    return splash.BlockSizes(
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


def _mask(length: int, causal: bool, max_segment_length: int | None) -> splash_mask.Mask:
    """Who may see whom in a row of this length, whatever its segments."""
    if max_segment_length is not None and max_segment_length < length:
        window = (max_segment_length - 1, 0 if causal else max_segment_length - 1)
        return splash_mask.LocalMask((length, length), window, offset=0)
    if causal:
        return splash_mask.CausalMask((length, length))
    return splash_mask.FullMask((length, length))
