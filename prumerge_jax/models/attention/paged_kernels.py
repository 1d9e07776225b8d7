"""Attention to pages by JAX's Pallas kernels for TPUs and GPUs; pages are [K, pages, page, Dh].

Both take scaled queries, and a page table whose width is a multiple of `TABLE_MULTIPLE`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.gpu import paged_attention as gpu
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

from prumerge_jax.sharding.mesh import platform

TABLE_MULTIPLE = 8
"""The page table's width is a multiple, and so of what a kernel takes at a time."""
_BLOCK = 64
"""Tokens that a kernel takes at a time, of which it reads the last ones in vain."""
_MAX_SPLITS = 16
"""Parts of a sequence at most that the GPU's kernel works on side by side."""


def tpu_takes(dtype: jnp.dtype, head_dim: int) -> bool:
    """Whether the TPU's kernel takes heads of this width; it computes in bfloat16."""
    return dtype == jnp.bfloat16 and head_dim % 128 == 0


def gpu_takes(dtype: jnp.dtype, head_dim: int) -> bool:
    """Whether the GPU's kernel takes heads of this width and dtype."""
    return dtype in (jnp.bfloat16, jnp.float16) and head_dim in (64, 128)


def pages_read(counts: np.ndarray, page_size: int) -> int:
    """Pages that one call of a kernel reads, for sequences of so many [B]."""
    block = _pages_at_a_time(page_size)
    return int((-(-counts // block) * block).sum())


def _pages_at_a_time(page_size: int) -> int:
    """A divisor of `TABLE_MULTIPLE`."""
    return max(pages for pages in (1, 2, 4, 8) if pages == 1 or pages * page_size <= _BLOCK)


def attend_on_tpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """`paged_xla.attend` by the TPU's kernel."""
    return paged_attention(
        q * q.shape[-1] ** -0.5,
        k,
        v,
        jnp.maximum(lengths, 1),
        first + tables,
        pages_per_compute_block=_pages_at_a_time(k.shape[2]),
    )


def attend_on_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    first: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """`paged_xla.attend` by the GPU's kernel."""
    blocks = tables.shape[1] // TABLE_MULTIPLE
    splits = max(split for split in range(1, _MAX_SPLITS + 1) if blocks % split == 0)
    return gpu.paged_attention(
        q * q.shape[-1] ** -0.5,
        k,
        v,
        first + tables,
        jnp.maximum(lengths, 1),
        pages_per_compute_block=_pages_at_a_time(k.shape[2]),
        k_splits=splits,
        interpret=platform() not in ("gpu", "cuda", "rocm"),
    )
