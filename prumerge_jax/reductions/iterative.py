"""PruMerge applied again to its own output, until a budget is met."""

import dataclasses
from typing import Annotated, Literal

import jax.numpy as jnp

from prumerge_jax import prumerge, selection
from prumerge_jax.options import Bounds, check
from prumerge_jax.prumerge import VisualTokens
from prumerge_jax.reductions.base import Evidence, Reduction, finite_evidence, without_nan
from prumerge_jax.reductions.registry import register
from prumerge_jax.reductions.set_rules import Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Iterative(Reduction):
    """The most attended tokens of the round before, each time with the pruned ones merged in.

    A token keeps the keys and the attention of its patch, and the features that it has taken in.

    Attributes:
      tokens: the budget; exactly as many are left.
      share: of the tokens that a round leaves, as long as the budget allows.
      merge, neighbours, similarity, pool: of every round, as in `PruMergeConfig`; the average by
        default, since sums of sums grow.
    """

    tokens: Tokens = 64
    share: Annotated[float, Bounds(0.01, 0.95)] = 0.5
    merge: Literal["sum", "mean", "none"] = "mean"
    neighbours: Tokens = 32
    similarity: Literal["cosine", "dot"] = "cosine"
    pool: Literal["all", "pruned"] = "pruned"

    def __post_init__(self) -> None:
        check(self)

    def capacity_for(self, num_patches: int) -> int:
        """R: the budget."""
        return min(self.tokens, num_patches)

    def counts(self, num_patches: int) -> list[int]:
        """Tokens after every round."""
        counts, count = [], num_patches
        while count > self.tokens:
            count = max(int(count * self.share), self.tokens)
            counts.append(count)
        return counts

    def reduce(self, evidence: Evidence) -> VisualTokens:
        """The tokens of the last round, in raster order."""
        finite = finite_evidence(evidence, "keys", "attention")
        evidence = without_nan(evidence, finite)
        tokens, keys, attention = evidence.hidden, evidence.keys, evidence.attention[..., None]
        batch, num_patches, _ = tokens.shape
        patches = jnp.broadcast_to(jnp.arange(num_patches, dtype=jnp.int32), (batch, num_patches))
        for count in self.counts(num_patches):
            config = prumerge.PruMergeConfig(
                min_tokens=count,
                max_tokens=count,
                merge=self.merge,
                neighbours=self.neighbours,
                similarity=self.similarity,
                pool=self.pool,
                extra_token=False,
                order="raster",
            )
            round_ = prumerge.reduce_tokens(tokens, keys, attention[..., 0], config)
            kept = round_.patch_indices
            tokens, keys = round_.tokens, selection.rows(keys, kept)
            attention = selection.rows(attention, kept)
            patches = jnp.take_along_axis(patches, kept, axis=1)
        required = jnp.where(finite, patches.shape[1], -1).astype(jnp.int32)
        return VisualTokens(
            tokens=jnp.where(finite[:, None, None], tokens, 0),
            lengths=jnp.maximum(required, 0),
            patch_indices=jnp.where(finite[:, None], patches, -1),
            required=required,
        )


register("prumerge-iterative", Iterative)
