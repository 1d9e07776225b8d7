"""The layers of a vision tower that computes its later layers on fewer tokens."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from prumerge_jax.models.tower_layers import head_attention
from prumerge_jax.reductions import stages as merging
from prumerge_jax.reductions.stages import Groups, Stage


def run_stages(
    layers: Any, x: jax.Array, stages: tuple[Stage, ...], *, num_heads: int
) -> tuple[jax.Array, Groups]:
    """Runs stacked layers, with merges at some of them: a scan between each two.

    Args:
      layers: modules from `layers.stack`, as `vision_tower.VisionLayer`.
      x: [B, N+1, D], CLS first.
      stages: by ascending layer; several may be at one layer.
      num_heads: H.

    Returns:
      The last layer's output [B, T, D], and what its tokens stand for.
    """
    graphdef, weights = nnx.split(layers)
    depth = jax.tree.leaves(weights)[0].shape[0]
    groups = merging.every_token(*x.shape[:2])
    bias: jax.Array | None = None
    begin = 0
    for number, at in itertools.groupby(stages, key=lambda stage: stage.layer):
        x = _scan(graphdef, _slice(weights, begin, number), x, bias)
        module: Any = nnx.merge(graphdef, jax.tree.map(lambda w, n=number: w[n], weights))
        here = list(at)
        x, groups = _merging_layer(module, x, groups, bias, here, num_heads)
        bias = jnp.log(groups.sizes) if here[-1].proportional else None
        begin = number + 1
    return _scan(graphdef, _slice(weights, begin, depth), x, bias), groups


def _slice(weights: nnx.State, begin: int, end: int) -> nnx.State:
    return jax.tree.map(lambda stacked: stacked[begin:end], weights)


def _scan(
    graphdef: nnx.GraphDef, weights: nnx.State, x: jax.Array, bias: jax.Array | None
) -> jax.Array:
    """Layers without a merge."""
    if not jax.tree.leaves(weights)[0].shape[0]:
        return x

    def body(x: jax.Array, layer: nnx.State) -> tuple[jax.Array, None]:
        module: Any = nnx.merge(graphdef, layer)
        return module(x, bias), None

    return jax.lax.scan(body, x, weights)[0]


def _merging_layer(
    layer: Any,
    x: jax.Array,
    groups: Groups,
    bias: jax.Array | None,
    stages: list[Stage],
    num_heads: int,
) -> tuple[jax.Array, Groups]:
    """One layer, and the merges at it."""
    queries, keys = layer.self_attn.queries_and_keys(layer.normalised(x))
    x = layer.attended(x, bias)
    after = [stage for stage in stages if stage.rule == "attention"]
    metric = keys.reshape(*keys.shape[:2], num_heads, -1).mean(2)
    for stage in stages:
        if stage.rule == "bipartite":
            division = merging.bipartite(metric, x.shape[1] - 1 - stage.tokens)
            x = merging.merge(x, groups.sizes, division)
            metric = merging.merge(metric, groups.sizes, division)
            groups = merging.regroup(groups, division)
    x = layer.after_attention(x)
    if after:
        attention = head_attention(queries[:, 0], keys, num_heads, bias).mean(1)
        division = merging.by_attention(attention, keys, after[-1].tokens)
        x = merging.merge(x, groups.sizes, division)
        groups = merging.regroup(groups, division)
    return x, groups
