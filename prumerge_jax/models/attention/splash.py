"""Attention by the Pallas kernel of TPUs (splash attention), padded to full blocks."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from prumerge_jax.models.attention.shards import on_shards
from prumerge_jax.sharding.mesh import Axes, platform

MAX_BLOCK = 640
"""Queries, and keys, per block at most."""
_LANES = 128
"""TPU lane count; block sizes must be multiples."""


def takes(dtype: jnp.dtype, head_dim: int) -> bool:
    """Whether the kernel takes heads of this width and dtype."""
    del dtype
    return head_dim % 64 == 0


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    causal: bool,
    max_segment_length: int | None,
    axes: Axes,
) -> jax.Array:
    """`attention.attend`; on a mesh every device runs the kernel on its own rows and heads."""
    run = functools.partial(_on_device, causal=causal, max_segment_length=max_segment_length)
    # The kernel does not declare its varying axes.
    return on_shards(run, (q, k, v, segment_ids), (axes, axes, axes, axes[:2]), check_vma=False)


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
    *,
    causal: bool,
    max_segment_length: int | None,
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
    kernel = splash.make_splash_mha(
        splash_mask.MultiHeadMask([_mask(padded, causal, max_segment_length)] * heads),
        block_sizes=_blocks(block, head_dim),
        head_shards=1,
        q_seq_shards=1,
        interpret=platform() != "tpu",
    )

    def one(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        return kernel(q, k, v, segment_ids=splash.SegmentIds(segments, segments))

    attended = jax.vmap(one)(q * head_dim**-0.5, k, v, segments)
    return attended.swapaxes(1, 2)[:, :length]


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
