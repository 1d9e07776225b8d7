"""EvoCut's score (arXiv 2606.01756): patches whose features change in directions of their own.

No code of the authors was found; starts and iterations of the k-means are this project's choice:
farthest points from patch 0, ten rounds.

Axes: B batch, N patches, D width, M directions.
"""

import dataclasses

import jax
import jax.numpy as jnp

from prumerge_jax import selection
from prumerge_jax.reductions import greedy
from prumerge_jax.reductions.base import Evidence
from prumerge_jax.reductions.registry import register
from prumerge_jax.reductions.set_rules import Order, SetRule

DIRECTIONS = 8
ROUNDS = 10
DECAY = 0.95
FIRST_DEPTH = 0.5
"""Share of the tower's layers before the first that counts: of 24 layers those from 12 on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvoCut(SetRule):
    """The patches whose features change in directions of their own (arXiv 2606.01756).

    The score runs through the upper half of the tower; no attention is read.
    """

    @property
    def needs(self) -> frozenset[str]:
        """The running score."""
        return frozenset({"watched"})

    def watch(
        self, score: jax.Array, before: jax.Array, after: jax.Array, depth: jax.Array
    ) -> jax.Array:
        """`update_score`, from the middle of the tower on."""
        return jax.lax.cond(
            depth >= FIRST_DEPTH, update_score, lambda score, *_: score, score, before, after
        )

    def order(self, evidence: Evidence, available: jax.Array, steps: int) -> Order:
        """By descending score."""
        assert evidence.watched is not None
        return Order(greedy.top(evidence.watched, available, steps))


def update_score(score: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
    """The running score after one more layer of the tower.

    Args:
      score: [B, N] float32, 0 before the first layer that counts.
      before, after: [B, N, D], the patches' features before and after the layer.

    Returns:
      [B, N] float32: 0.95 of the score, and 0.05 of one less the largest cosine between a patch's
      update and the mean directions of all updates.
    """
    updates = selection.unit_rows(
        after.astype(jnp.float32) - before.astype(jnp.float32), greedy.SHORTEST
    )
    nearest = selection.einsum("bnd,bmd->bnm", updates, mean_directions(updates)).max(-1)
    return DECAY * score + (1 - DECAY) * (1 - nearest)


def mean_directions(updates: jax.Array) -> jax.Array:
    """Spherical k-means of unit vectors [B, N, D] -> [B, M, D]; an empty group keeps its centre."""

    def seed(t: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        chosen, nearest = carry
        # The first is patch 0: all are equally far before it.
        farthest = jnp.argmin(nearest, axis=-1).astype(jnp.int32)
        similarity = selection.einsum("bnd,bd->bn", updates, greedy.row(updates, farthest))
        return chosen.at[:, t].set(farthest), jnp.maximum(nearest, similarity)

    batch, patches, _ = updates.shape
    start = (
        jnp.zeros((batch, DIRECTIONS), jnp.int32),
        jnp.full((batch, patches), -jnp.inf),
    )
    chosen, _ = jax.lax.fori_loop(0, DIRECTIONS, seed, start)
    centres = jnp.take_along_axis(updates, chosen[..., None], axis=1)

    def refine(_: jax.Array, centres: jax.Array) -> jax.Array:
        group = jnp.argmax(selection.einsum("bnd,bmd->bnm", updates, centres), axis=-1)
        member = (group[:, None] == jnp.arange(DIRECTIONS)[:, None]).astype(jnp.float32)
        mean = selection.unit_rows(
            selection.einsum("bmn,bnd->bmd", member, updates), greedy.SHORTEST
        )
        return jnp.where(member.sum(-1)[..., None] > 0, mean, centres)

    return jax.lax.fori_loop(0, ROUNDS, refine, centres)


register("evocut", EvoCut)
