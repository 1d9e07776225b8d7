"""Attention: what may see what is stated here; how it is computed is up to each backend.

Backends, one file each:

* `xla`: plain XLA; every platform, the reference for the others.
* `blocks`: plain XLA in blocks of queries, for CPUs; `tiles` for rows with branches.
* `cudnn`: the fused kernel of NVIDIA GPUs; float16 or bfloat16.
* `splash`: the Pallas kernel of TPUs.

`pages` has the keys and values of growing sequences, and the attention of one new token to them.
"""

import jax
import jax.numpy as jnp

from prumerge_jax.models import tuning
from prumerge_jax.models.attention import blocks, cudnn, splash, xla
from prumerge_jax.models.attention.key_bias import with_columns
from prumerge_jax.models.attention.pages import (
    KVPages,
    attend_to_pages,
    copy_in_pages,
    empty_pages,
    over_shards,
    pages_spec,
    tokens_read,
    write_to_pages,
)
from prumerge_jax.models.attention.shards import HEADS
from prumerge_jax.sharding.mesh import Axes

__all__ = [
    "KVPages",
    "attend",
    "attend_to_pages",
    "copy_in_pages",
    "backend_for",
    "empty_pages",
    "over_shards",
    "padded_length",
    "pages_spec",
    "tokens_read",
    "write_to_pages",
]

_BACKENDS = {
    "xla": xla.attend,
    "blocks": blocks.attend,
    "cudnn": cudnn.attend,
    "splash": splash.attend,
}
_TAKES = {"cudnn": cudnn.takes, "splash": splash.takes}


@jax.named_scope("attention")
def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    key_bias: jax.Array | None = None,
    branch_ids: jax.Array | None = None,
    causal: bool = False,
    max_segment_length: int | None = None,
    scale: float | None = None,
    axes: Axes = HEADS,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention of a sequence with itself.

    Args:
      q: [B, T, H, D].
      k, v: [B, T, K, D]; K divides H (grouped-query attention).
      segment_ids: [B, T] int32; a query sees only keys of its own segment.
      key_bias: [B, T] float32, added to the logits of a key for every query. Heads are then wider,
        see `key_bias.py`; a preferred backend that does not take them gives way to `xla`.
      branch_ids: [B, T] int32, for segments whose sequences share a prefix: it is branch 0, and
        each sequence goes on in a branch 1, 2, ... of its own. A query sees only keys of the prefix
        and of its own branch. Needs `segment_ids` and `causal`; `blocks` has no gradient then.
      causal: a query sees only keys at its own index or before.
      max_segment_length: the promise that no segment has more tokens and that each is in one
        piece; with branches, that each is in one piece and the prefix with any of them has no more.
        `blocks` and `splash` then leave out keys that are too far away to be seen; the
        others ignore it.
      scale: factor of the logits; by default one over the root of the width of heads. Not together
        with `key_bias`.
      axes: logical names of the axes of `q`, `k` and `v`, which say how a mesh splits them.
      implementation: a backend; by default `backend_for` these heads.

    Returns:
      [B, T, H, D] in the dtype of `q`.

    Raises:
      ValueError: an unknown implementation, branches without segments or causality, or a scale with
        biases.
    """
    if branch_ids is not None and (segment_ids is None or not causal):
        raise ValueError("branch_ids need segment_ids and causal=True")
    head_dim = q.shape[-1]
    if key_bias is not None:
        if scale is not None:
            raise ValueError("scale and key_bias cannot be given together")
        q, k, v = with_columns(q, k, v, key_bias)
    name = implementation or backend_for(q.dtype, q.shape[-1])
    if name not in _BACKENDS:
        raise ValueError(f"unknown attention {name!r:.80}; expected one of {sorted(_BACKENDS)}")
    attended = _BACKENDS[name](
        q,
        k,
        v,
        segment_ids,
        branch_ids,
        causal=causal,
        max_segment_length=max_segment_length,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        axes=axes,
    )
    return attended[..., :head_dim]


def padded_length(length: int, dtype: jnp.dtype, head_dim: int) -> int:
    """Number of tokens to which the backend for these heads pads a sequence of this length."""
    is_splash = backend_for(dtype, head_dim) == "splash"
    return splash.block_sizes(length)[1] if is_splash else length


def backend_for(dtype: jnp.dtype, head_dim: int) -> str:
    """The backend for heads of this width and dtype: the tuning's if it takes them, else `xla`.

    Heads of the tower and of the decoder differ, so each gets a separate answer.
    """
    preferred = tuning.current().attention
    takes = _TAKES.get(preferred)
    return preferred if takes is None or takes(dtype, head_dim) else "xla"
