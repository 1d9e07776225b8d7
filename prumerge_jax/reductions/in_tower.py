"""Reductions inside the vision tower, which then computes its later layers on fewer tokens."""

import dataclasses
from typing import Annotated

import jax.numpy as jnp

from prumerge_jax.options import Bounds, check
from prumerge_jax.prumerge import VisualTokens
from prumerge_jax.reductions.base import Assignment, Evidence, Reduction, finite_evidence
from prumerge_jax.reductions.registry import register
from prumerge_jax.reductions.set_rules import Tokens
from prumerge_jax.reductions.stages import Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class InTower(Reduction):
    """PruMerge at three layers of the tower: its most attended patches, the others averaged in.

    The layers are a quarter, five eighths and seven eighths up the tower: in CLIP-L none of those
    where attention sinks appear.

    Attributes:
      tokens: patches left at the end; as many stay at each layer that shares are equal.
      proportional: whether later layers add log(size) to the attention logits of a merged token.
    """

    tokens: Tokens = 64
    proportional: bool = True

    def __post_init__(self) -> None:
        check(self)

    @property
    def needs(self) -> frozenset[str]:
        """What the tower's tokens stand for."""
        return frozenset({"groups"})

    def capacity_for(self, num_patches: int) -> int:
        """R: the patches that are left."""
        return min(self.tokens, num_patches)

    def stages(self, depth: int, num_patches: int) -> tuple[Stage, ...]:
        """Three merges, of equal share each."""
        layers = [min(round(depth * share), depth - 1) for share in (1 / 4, 5 / 8, 7 / 8)]
        counts = equal_shares(num_patches, self.capacity_for(num_patches), len(layers))
        return tuple(
            Stage(layer, count, "attention", self.proportional)
            for layer, count in zip(layers, counts, strict=True)
        )

    def reduce(self, evidence: Evidence) -> VisualTokens:
        """The patches that are left, in raster order."""
        assert evidence.groups is not None
        finite = finite_evidence(evidence)
        # Where a baseline asks, the tower merged nothing.
        left = self.capacity_for(evidence.hidden.shape[1])
        required = jnp.where(finite, left, -1).astype(jnp.int32)
        return VisualTokens(
            tokens=jnp.where(finite[:, None, None], evidence.hidden, 0),
            lengths=jnp.maximum(required, 0),
            patch_indices=jnp.where(finite[:, None], evidence.groups.patches[:, 1:], -1),
            required=required,
        )

    def explain(self, evidence: Evidence) -> Assignment:
        """The token that took in each patch; -1 where that is CLS."""
        assert evidence.groups is not None
        visual = self.reduce(evidence)
        return Assignment(
            visual.patch_indices, evidence.groups.token_of[:, 1:] - 1, visual.required
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToMe(InTower):
    """Bipartite merging between attention and MLP (arXiv 2210.09461), at evenly spaced layers.

    The paper merges in every layer; fewer and larger merges have fewer shapes to compile.

    Attributes:
      merges: number of merges; more where each would have to halve the tokens.
    """

    merges: Annotated[int, Bounds(1, 64)] = 6

    def stages(self, depth: int, num_patches: int) -> tuple[Stage, ...]:
        """Merges of equal share."""
        least, merges = self.capacity_for(num_patches), self.merges
        while not _can_halve(num_patches, counts := equal_shares(num_patches, least, merges)):
            merges += 1
        layers = [int(depth * (2 * i + 1) / (2 * merges)) for i in range(merges)]
        return tuple(
            Stage(layer, count, "bipartite", self.proportional)
            for layer, count in zip(layers, counts, strict=True)
        )


def equal_shares(num_patches: int, tokens: int, steps: int) -> list[int]:
    """Patches after every step, if each leaves the same share."""
    share = (tokens / num_patches) ** (1 / steps)
    return [max(round(num_patches * share ** (i + 1)), tokens) for i in range(steps)]


def _can_halve(num_patches: int, counts: list[int]) -> bool:
    """Whether no step merges more tokens than there are at even places without CLS."""
    before = [num_patches, *counts]
    return all(x - y <= x // 2 for x, y in zip(before, counts, strict=False))


register("intower", InTower)
register("tome", ToMe)
