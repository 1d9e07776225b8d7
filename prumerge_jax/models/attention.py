"""One seam for attention: what may see what is said once, each backend computes it its way.

Backends, by name:

* `xla`: plain XLA, every platform, the reference for the others.
* `blocks`: XLA on CPUs, block after block of queries.
* `cudnn`: NVIDIA GPUs; float16 or bfloat16. Asked for by name, because `None` means XLA to JAX.
* `splash`: TPU; the Pallas kernel, query and key lengths multiples of its block.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

from prumerge_jax.distributed import sharding

SPLASH_BLOCK = 128
_XLA_OR_CUDNN: dict[str, Literal["xla", "cudnn"]] = {"xla": "xla", "cudnn": "cudnn"}
QUERY_BLOCK, MOST_BLOCKS = 128, 8
"""Of `blocks`: queries are taken in blocks of at least so many, and in at most so many blocks."""


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    causal: bool = False,
    implementation: str = "xla",
) -> jax.Array:
    """Softmax attention of a sequence with itself, scale 1/sqrt(head width).

    Args:
      q: [B, T, H, D].
      k, v: [B, T, K, D]; K divides H (grouped-query attention).
      segment_ids: [B, T] int32; a query sees only keys of its own segment.
      causal: a query sees only keys at its own index or before.
      implementation: `xla`, `blocks`, `cudnn` or `splash`.

    Returns:
      [B, T, H, D] in the dtype of `q`.

    Raises:
      ValueError: an unknown implementation, or one that cannot run these shapes.
    """
    if implementation == "splash":
        return _splash(q, k, v, segment_ids, causal=causal)
    if implementation == "blocks":
        return _by_blocks(q, k, v, segment_ids, causal=causal)
    if implementation not in _XLA_OR_CUDNN:
        raise ValueError(
            f"unknown attention {implementation!r}; expected 'xla', 'blocks', 'cudnn' or 'splash'"
        )
    mask = None
    if segment_ids is not None:
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    return _dot_product(q, k, v, mask, causal=causal, backend=_XLA_OR_CUDNN[implementation])


def attend_to_cache(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array, *, implementation: str = "xla"
) -> jax.Array:
    """Attention of one new token per sequence to its cache.

    Args:
      q: [B, 1, H, D].
      k, v: [B, S, K, D], the cache with the new token's entries already written.
      lengths: [B] int32, the number of valid entries. Entries beyond it are never seen, but must
        be finite: masking here would read the whole cache once more at every step.
      implementation: as in `attend`; `blocks` and `splash` have no decode form and fall to `xla`.

    Returns:
      [B, 1, H, D].
    """
    valid = jnp.arange(k.shape[1]) < lengths[:, None]
    backend = _XLA_OR_CUDNN.get(implementation, "xla")
    return _dot_product(q, k, v, valid[:, None, None, :], causal=False, backend=backend)


def default_implementation(dtype: jnp.dtype, head_dim: int) -> str:
    """The fastest backend of the current mesh's platform for heads of this width and dtype."""
    platform = _platform()
    half = dtype in (jnp.bfloat16, jnp.float16)
    if platform == "gpu" and half and head_dim <= 128 and head_dim % 8 == 0:
        return "cudnn"
    if platform == "tpu" and head_dim % 128 == 0:
        return "splash"
    return "blocks" if platform == "cpu" else "xla"


def _platform() -> str:
    """Of the current mesh, whose devices may only be compiled for; without one, the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


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
    if dtype == jnp.float16 and backend == "xla" and _platform() == "cpu":
        # XLA has no product of float16 numbers there whose sum is float32.
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    seen = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, implementation=backend
    )
    return seen.astype(dtype)


def _by_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    causal: bool,
) -> jax.Array:
    """Block after block of queries, so that the scores of one stay in the processor's cache.

    Where attention is causal, the keys behind a block are not even multiplied: nearly half of all.
    """
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    q = q.transpose(0, 2, 3, 1, 4)  # [B, K, G, T, D]
    k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))  # [B, K, T, D]
    size = max(QUERY_BLOCK, -(-length // MOST_BLOCKS))
    blocks = []
    for start in range(0, length, size):
        end = min(start + size, length)
        seen = end if causal else length
        mask = jnp.ones((1, end - start, seen), bool)
        if causal:
            mask = (jnp.arange(seen) <= jnp.arange(start, end)[:, None])[None]
        if segment_ids is not None:
            mask = mask & (segment_ids[:, start:end, None] == segment_ids[:, None, :seen])
        scores = jnp.einsum(
            "bkgtd,bksd->bkgts",
            q[..., start:end, :],
            k[:, :, :seen],
            preferred_element_type=jnp.float32,
        )
        # Every query sees itself, so that no row is masked throughout.
        scores = jnp.where(mask[:, None, None], scores * head_dim**-0.5, -jnp.inf)
        highest = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - highest)
        mixed = jnp.einsum(
            "bkgts,bksd->bkgtd",
            weights.astype(v.dtype),
            v[:, :, :seen],
            preferred_element_type=jnp.float32,
        )
        blocks.append((mixed / weights.sum(-1, keepdims=True)).astype(q.dtype))
    mixed = jnp.concatenate(blocks, axis=3).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, heads, head_dim)


def _splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array | None,
    *,
    causal: bool,
) -> jax.Array:
    batch, length, heads, head_dim = q.shape
    if length % SPLASH_BLOCK:
        raise ValueError(
            f"splash attention needs a length that is a multiple of {SPLASH_BLOCK}, got {length}; "
            "pad the rows or use implementation='xla'"
        )
    if k.shape[2] != heads:  # the multi-head kernel wants one key head per query head
        k, v = (jnp.repeat(x, heads // k.shape[2], axis=2) for x in (k, v))
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    run = functools.partial(splash_heads, causal=causal, interpret=_platform() != "tpu")
    if not jax.sharding.get_abstract_mesh().empty:
        heads_spec = sharding.spec("batch", None, "heads", None)
        run = jax.shard_map(
            run,
            in_specs=(heads_spec, heads_spec, heads_spec, sharding.spec("batch", None)),
            out_specs=heads_spec,
            check_vma=False,  # the kernel does not declare its varying axes
        )
    return run(q * head_dim**-0.5, k, v, segment_ids)


def splash_heads(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    causal: bool,
    interpret: bool,
) -> jax.Array:
    """The splash kernel on one device's share; `q` is scaled already, shapes as in `attend`."""
    length, heads = q.shape[1:3]
    one_head = (
        splash_mask.CausalMask((length, length))
        if causal
        else splash_mask.FullMask((length, length))
    )
    kernel = splash.make_splash_mha(
        splash_mask.MultiHeadMask([one_head] * heads),
        block_sizes=splash.BlockSizes(
            block_q=SPLASH_BLOCK,
            block_kv=SPLASH_BLOCK,
            block_kv_compute=SPLASH_BLOCK,
            block_q_dkv=SPLASH_BLOCK,
            block_kv_dkv=SPLASH_BLOCK,
            block_kv_dkv_compute=SPLASH_BLOCK,
            block_q_dq=SPLASH_BLOCK,
            block_kv_dq=SPLASH_BLOCK,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def one(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
        return kernel(q, k, v, segment_ids=splash.SegmentIds(segments, segments))

    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # the kernel takes heads first
    return jax.vmap(one)(q, k, v, segment_ids).swapaxes(1, 2)
