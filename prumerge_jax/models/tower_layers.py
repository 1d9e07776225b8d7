"""The layers of a vision tower in turn, and what is watched on the way."""

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

Watch = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
"""A running score [B, N] float32, the patches before and after a layer [B, N, D], and the layer's
number over that of all layers -> the score after it. See `reductions.Reduction.watch`."""


_Carry = tuple[jax.Array, jax.Array | None, jax.Array | None]


class LayerOutputs(NamedTuple):
    """What a stack of layers leaves behind.

    Attributes:
      hidden: [B, T, D], the output of its last layer.
      before_last: [B, T, D], that layer's input, where asked for.
      watched: [B, N] float32, the running score, where asked for.
    """

    hidden: jax.Array
    before_last: jax.Array | None
    watched: jax.Array | None


def run_layers(
    layers: Any,
    x: jax.Array,
    *,
    num_layers: int,
    first_patch: int,
    remember: bool = False,
    watch: Watch | None = None,
) -> LayerOutputs:
    """Scans over stacked layers.

    Args:
      layers: modules from `layers.stack`; each maps [B, T, D] to [B, T, D].
      x: [B, T, D].
      num_layers: layers of the complete tower, of which the stack are the first.
      first_patch: number of tokens before the patches.
      remember: whether the last layer's input is wanted: one buffer more.
      watch: a running score, 0 before the first layer; None without one.
    """
    graphdef, weights = nnx.split(layers)

    def body(carry: _Carry, layer: tuple[nnx.State, jax.Array]) -> tuple[_Carry, None]:
        before, _, score = carry
        weights, number = layer
        module = cast(Callable[[jax.Array], jax.Array], nnx.merge(graphdef, weights))
        after = module(before)
        if watch is not None and score is not None:
            score = watch(
                score, before[:, first_patch:], after[:, first_patch:], number / num_layers
            )
        return (after, before if remember else None, score), None

    score = None if watch is None else jnp.zeros((len(x), x.shape[1] - first_patch), jnp.float32)
    depth = jax.tree.leaves(weights)[0].shape[0]
    start = (x, x if remember else None, score)
    outputs, _ = jax.lax.scan(body, start, (weights, jnp.arange(depth)))
    return LayerOutputs(*outputs)


def head_attention(
    query_cls: jax.Array, keys: jax.Array, num_heads: int, key_bias: jax.Array | None = None
) -> jax.Array:
    """Attention of CLS to the patches in every head, as the tower itself computes it.

    Args:
      query_cls: [B, D], CLS query of a block, bias included, heads side by side.
      keys: [B, N+1, D], keys of that block, CLS first.
      num_heads: H.
      key_bias: [B, N+1] float32, added to the logits; None adds nothing.

    Returns:
      [B, H, N] float32: a softmax over N+1 entries without its first.
    """
    query, keys = query_cls.astype(jnp.float32), keys.astype(jnp.float32)
    query = query.reshape(len(query), num_heads, -1)
    keys = keys.reshape(*keys.shape[:2], num_heads, -1)
    logits = jnp.einsum("bhd,bnhd->bhn", query, keys, precision="highest") * query.shape[-1] ** -0.5
    if key_bias is not None:
        logits = logits + key_bias[:, None]
    return jax.nn.softmax(logits, axis=-1)[..., 1:]
