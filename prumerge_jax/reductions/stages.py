"""Merging inside the vision tower: which tokens go on, and which of them takes in the others.

Axes: B batch, T tokens of a layer, CLS first, D width, H heads.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from prumerge_jax import selection
from prumerge_jax.reductions import greedy


class Stage(NamedTuple):
    """Fewer tokens from a layer of the tower on; static under `jax.jit`.

    Attributes:
      layer: number of the layer, from 0.
      tokens: patches that are left.
      rule: `bipartite` merges between the layer's attention and its MLP (ToMe), `attention` after
        the layer (PruMerge).
      proportional: whether later layers add log(size) to the attention logits of a merged token.
    """

    layer: int
    tokens: int
    rule: Literal["bipartite", "attention"]
    proportional: bool = True


class Groups(NamedTuple):
    """What the tokens of a layer stand for.

    Attributes:
      patches: [B, T] int32, the patch whose place a token has; -1 for CLS.
      sizes: [B, T] float32, tokens of the first layer that are in it.
      token_of: [B, T0] int32, the token that every token of the first layer is in.
    """

    patches: jax.Array
    sizes: jax.Array
    token_of: jax.Array


class Division(NamedTuple):
    """Which tokens go on, and where the others go.

    Attributes:
      survivors: [B, T'] int32, in ascending order.
      slot_of: [B, T] int32, the survivor's slot that every token is merged into.
    """

    survivors: jax.Array
    slot_of: jax.Array


def every_token(batch: int, tokens: int) -> Groups:
    """The groups before the first layer."""
    index = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))
    return Groups(index - 1, jnp.ones((batch, tokens), jnp.float32), index)


def bipartite(metric: jax.Array, merges: int) -> Division:
    """ToMe's matching (arXiv 2210.09461): even places merge into the most similar odd ones.

    The strongest `merges` edges are taken; CLS, at place 0, stays.

    Args:
      metric: [B, T, D], what similarity is measured on.
      merges: tokens fewer, at most those at even places without CLS.
    """
    tokens = metric.shape[1]
    similarity = greedy.cosines(metric[:, ::2], metric[:, 1::2])
    strength = similarity.max(-1).at[:, 0].set(-jnp.inf)
    partner = 2 * jnp.argmax(similarity, axis=-1) + 1
    merged = selection.descending_rank(strength) < merges
    gone = jnp.zeros(metric.shape[:2], bool).at[:, ::2].set(merged)
    slot = selection.count_before(~gone)
    index = jnp.broadcast_to(jnp.arange(tokens), gone.shape)
    into = index.at[:, ::2].set(jnp.where(merged, partner, index[:, ::2]))
    slot_of = jnp.take_along_axis(slot, into, axis=1)
    return Division(_places(~gone, tokens - merges), slot_of)


def by_attention(attention: jax.Array, keys: jax.Array, tokens: int) -> Division:
    """CLS and the most attended patches stay; each other joins the kept one of most similar key.

    Args:
      attention: [B, T - 1] float32, of CLS to the patches.
      keys: [B, T, D].
      tokens: patches that stay.
    """
    stays = selection.descending_rank(attention) < tokens
    stays = jnp.pad(stays, ((0, 0), (1, 0)), constant_values=True)
    slot = selection.count_before(stays)
    similarity = greedy.cosines(keys)
    allowed = stays & (jnp.arange(keys.shape[1]) > 0)
    nearest = jnp.argmax(jnp.where(allowed[:, None], similarity, -jnp.inf), axis=-1)
    slot_of = jnp.where(stays, slot, jnp.take_along_axis(slot, nearest, axis=1))
    return Division(_places(stays, tokens + 1), slot_of)


def merge(x: jax.Array, sizes: jax.Array, division: Division) -> jax.Array:
    """Size-weighted means of what is merged: [B, T, D], [B, T] -> [B, T', D] in the dtype of x."""
    weights = _members(division) * sizes[:, None]
    weights = weights / weights.sum(-1, keepdims=True)
    # Not rounded to the dtype of x: a token that takes in none must stay what it is.
    merged = selection.einsum("brt,btd->brd", weights, x.astype(jnp.float32))
    alone = (_members(division).sum(-1) == 1)[..., None]
    return jnp.where(alone, selection.rows(x, division.survivors), merged.astype(x.dtype))


def regroup(groups: Groups, division: Division) -> Groups:
    """The groups after a division."""
    members = _members(division)
    return Groups(
        jnp.take_along_axis(groups.patches, division.survivors, axis=1),
        (members * groups.sizes[:, None]).sum(-1),
        jnp.take_along_axis(division.slot_of, groups.token_of, axis=1),
    )


def _members(division: Division) -> jax.Array:
    """Which token is merged into which slot, [B, T', T] bool."""
    slots = jnp.arange(division.survivors.shape[1])
    return division.slot_of[:, None] == slots[:, None]


def _places(mask: jax.Array, count: int) -> jax.Array:
    """Indices of the `count` True entries of [B, T], ascending, [B, count] int32."""
    return selection.patch_in_slot(selection.in_slot(mask, selection.count_before(mask), count))
