"""How important each patch is, where no CLS token says so: substitutes for CLS attention.

Axes: B images, N patches, D tower width, H heads, d = D / H. Everything in float32 at highest
precision, as for CLS attention; every result sums to 1 over the patches.
"""

import jax
import jax.numpy as jnp

from prumerge_jax import selection


def substitute_attention(
    name: str, queries: jax.Array, keys: jax.Array, num_heads: int
) -> jax.Array:
    """One of `config.ATTENTION_SUBSTITUTES` but `map`, which is `vision_tower.PoolingHead`.

    Args:
      name: `received`, the attention a patch receives, mean over heads and queries (HoliTom,
        VisPruner), or `mean_query`, that of the mean query of all patches (PACT, in the decoder);
        their wide forms have one head as wide as the tower, PruMerge's own convention for CLS.
      queries: [B, N, D] of a block, biases included, heads side by side.
      keys: [B, N, D], its keys.
      num_heads: H.

    Returns:
      [B, N] float32.
    """
    heads = 1 if name.endswith("_wide") else num_heads
    attend = received_attention if name.startswith("received") else mean_query_attention
    return attend(queries, keys, heads)


def received_attention(queries: jax.Array, keys: jax.Array, num_heads: int) -> jax.Array:
    """mean_h mean_i softmax_j(q_hi k_hj / sqrt d): queries [B, N, D], keys [B, N, D] -> [B, N].

    One head after the other: all together would take [B, H, N, N] floats.
    """
    q, k = (_heads_first(x, num_heads) for x in (queries, keys))

    def of_head(total: jax.Array, head: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        logits = selection.einsum("bid,bjd->bij", *head) * head[0].shape[-1] ** -0.5
        return total + jax.nn.softmax(logits, axis=-1).mean(axis=1), None

    zeros = jnp.zeros(keys.shape[:2], jnp.float32)
    total, _ = jax.lax.scan(of_head, zeros, (q, k))
    return total / num_heads


def mean_query_attention(queries: jax.Array, keys: jax.Array, num_heads: int) -> jax.Array:
    """mean_h softmax_j(q'_h k_hj / sqrt d), q' the mean query: [B, N, D] twice -> [B, N]."""
    q, k = (_heads_first(x, num_heads) for x in (queries, keys))
    logits = selection.einsum("hbd,hbjd->hbj", q.mean(axis=2), k) * q.shape[-1] ** -0.5
    return jax.nn.softmax(logits, axis=-1).mean(axis=0)


def _heads_first(x: jax.Array, num_heads: int) -> jax.Array:
    """[B, N, D] -> [H, B, N, d] float32."""
    split = x.astype(jnp.float32).reshape(*x.shape[:2], num_heads, -1)
    return jnp.moveaxis(split, 2, 0)
