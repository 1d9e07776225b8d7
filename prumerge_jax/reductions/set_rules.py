"""Reductions that choose a set of patches one by one: coverage, distance, determinants, attention.

One order of choice serves every budget: the patches kept at 32 tokens are among those kept at 64.
Tokens are the kept patches' own features, in raster order.
"""

import dataclasses
from abc import abstractmethod
from typing import Annotated, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp

from prumerge_jax import prumerge, selection
from prumerge_jax.options import Bounds, check
from prumerge_jax.prumerge import VisualTokens
from prumerge_jax.reductions import greedy
from prumerge_jax.reductions.base import (
    Assignment,
    Evidence,
    Reduction,
    all_available,
    finite_evidence,
    kept_rows,
    without_nan,
)
from prumerge_jax.reductions.registry import register

MOST_TOKENS = 1 << 16
Tokens = Annotated[int, Bounds(1, MOST_TOKENS)]


class Order(NamedTuple):
    """The order in which patches are chosen.

    Attributes:
      patches: [B, K] int32.
      coverage: [B, K] float32, mean over patches of the best similarity to those chosen so far;
        None where the rule does not know it.
    """

    patches: jax.Array
    coverage: jax.Array | None = None


class Ranking(NamedTuple):
    """The order of choice of every image, whatever the budget.

    Attributes:
      order: the first K patches.
      evidence: with zeros for images that are not finite.
      available: [B] int32, patches that may be chosen; -1 where the evidence is not finite.
    """

    order: Order
    evidence: Evidence
    available: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class SetRule(Reduction):
    """As many patches as a budget allows, in the order of a rule.

    Attributes:
      tokens: patches kept per image where `adaptive` is `none`.
      adaptive: `attention` keeps as many patches as there are outliers among the attention
        (PruMerge's rule, section 3.2 of its paper), times `factor`.
      factor: of the count of outliers.
      min_tokens, max_tokens: bounds on adaptive counts; None is no bound.
      capacity: R; None is the most that an image can need.
      merge: `mean` averages every other patch into the kept one that it is most similar to.
      size_bias: whether the decoder adds log(patches in a token) to its attention logits, as if
        each patch were still there; takes effect on merged tokens.
    """

    tokens: Tokens = 64
    adaptive: Literal["none", "attention"] = "none"
    factor: Annotated[float, Bounds(0.01, 100.0)] = 1.0
    min_tokens: Tokens = 1
    max_tokens: Tokens | None = None
    capacity: Tokens | None = None
    merge: Literal["none", "mean"] = "none"
    size_bias: bool = True

    def __post_init__(self) -> None:
        check(self)
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(
                f"max_tokens is {self.max_tokens}; expected at least min_tokens, {self.min_tokens}"
            )

    @property
    def varying(self) -> bool:
        """Whether counts are adaptive."""
        return self.adaptive != "none"

    @property
    def reads_attention(self) -> bool:
        """Whether the CLS attention decides anything."""
        return self.adaptive == "attention"

    @property
    def weighs_tokens(self) -> bool:
        """Whether patches are merged, and the decoder is told how many."""
        return self.merge == "mean" and self.size_bias

    def capacity_for(self, num_patches: int) -> int:
        """R: the capacity that was asked for, or the most tokens that an image can need."""
        most = self.most_for(num_patches) if self.varying else self.tokens
        if self.varying and self.max_tokens is not None:
            most = min(most, self.max_tokens)
        most = min(most, num_patches)
        return most if self.capacity is None else min(self.capacity, most)

    def most_for(self, num_patches: int) -> int:
        """The largest adaptive count, without its bounds."""
        # At most a quarter of all values can be above the third quartile.
        return max(int(num_patches // 4 * self.factor + 0.5), self.min_tokens)

    def uncapped(self) -> Self:
        """The same rule without a capacity."""
        return dataclasses.replace(self, capacity=None)

    @abstractmethod
    def order(self, evidence: Evidence, available: jax.Array, steps: int) -> Order:
        """The first `steps` patches in the order of choice, among those available [B, N]."""

    def rank(self, evidence: Evidence, steps: int) -> Ranking:
        """The first `steps` patches in the order of choice, of which any budget is a prefix."""
        finite = finite_evidence(
            evidence, *self.needs, *(["attention"] if self.reads_attention else [])
        )
        evidence = without_nan(evidence, finite)
        available = all_available(evidence)
        count = jnp.where(finite, available.sum(-1), -1).astype(jnp.int32)
        return Ranking(self.order(evidence, available, steps), evidence, count)

    def reduce(self, evidence: Evidence) -> VisualTokens:
        """The first patches of the order, in raster order."""
        steps = self.capacity_for(evidence.hidden.shape[1])
        order, evidence, available = self.rank(evidence, steps)
        required = jnp.minimum(self.required(evidence, order), available).astype(jnp.int32)
        return self.first(evidence.hidden, order.patches, required, all_available(evidence))

    def first(
        self, hidden: jax.Array, patches: jax.Array, counts: jax.Array, available: jax.Array
    ) -> VisualTokens:
        """The first patches of an order, in raster order, merged where the rule merges.

        Args:
          hidden: [B, N, D].
          patches: [B, K] int32, in the order of choice; K is the capacity.
          counts: [B] int32, patches to keep before the cap; -1 where the evidence is not finite.
          available: [B, N] bool, patches that are no padding.
        """
        num_patches, steps = hidden.shape[1], patches.shape[1]
        in_prefix = jnp.arange(steps) < counts[:, None]
        chosen = selection.members(jnp.where(in_prefix, patches, -1), num_patches)
        patch_indices = selection.patch_in_slot(
            selection.in_slot(chosen, selection.count_before(chosen), steps)
        )
        visual = kept_rows(hidden, patch_indices, counts)
        if self.merge == "none":
            return visual
        return merge_mean(hidden, visual, available, with_size=self.size_bias)

    def explain(self, evidence: Evidence) -> Assignment:
        """Kept patches, and for the others the kept one that takes them in."""
        shown = super().explain(evidence)
        if self.merge == "none":
            return shown
        clean = without_nan(evidence, shown.required >= 0)
        target = nearest_slot(clean.hidden, shown.patch_indices, all_available(clean))
        return shown._replace(targets=jnp.where(shown.required[:, None] > 0, target, -1))

    def required(self, evidence: Evidence, order: Order) -> jax.Array:
        """Number of tokens that every image needs, [B] int32; may be above the capacity."""
        batch, num_patches, _ = evidence.hidden.shape
        if not self.varying:
            return jnp.full(batch, min(self.tokens, num_patches), jnp.int32)
        most = num_patches if self.max_tokens is None else min(self.max_tokens, num_patches)
        least = min(self.min_tokens, most)
        return jnp.clip(self.adaptive_count(evidence, order), least, most)

    def adaptive_count(self, evidence: Evidence, order: Order) -> jax.Array:
        """The count that the image itself asks for, [B] int32, without its bounds."""
        outliers = prumerge.number_of_outliers(evidence.attention, present=evidence.present)
        return jnp.floor(outliers * self.factor + 0.5).astype(jnp.int32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cover(SetRule):
    """Greedy coverage of the patch features, optionally weighted by attention.

    Each step keeps the patch that raises the mean similarity of all patches to the nearest kept
    one most; SCOPE (arXiv 2510.24214) with alpha 1.

    Attributes:
      adaptive: as in `SetRule`; `coverage` keeps as many patches as reach `threshold`.
      threshold: mean similarity of an image's patches to the nearest kept one.
      alpha: exponent of the attention that multiplies a gain; 0 is coverage alone.
      block: patches kept per look at all gains.
    """

    adaptive: Literal["none", "attention", "coverage"] = "none"  # type: ignore[assignment]
    threshold: Annotated[float, Bounds(0.0, 1.0)] = 0.95
    alpha: Annotated[float, Bounds(0.0, 8.0)] = 0.0
    block: Annotated[int, Bounds(1, 64)] = 1

    @property
    def reads_attention(self) -> bool:
        """Whether the CLS attention decides anything."""
        return self.alpha > 0 or super().reads_attention

    def most_for(self, num_patches: int) -> int:
        """The largest adaptive count, without its bounds."""
        return num_patches if self.adaptive == "coverage" else super().most_for(num_patches)

    def adaptive_count(self, evidence: Evidence, order: Order) -> jax.Array:
        """The count that the image itself asks for, [B] int32, without its bounds."""
        if self.adaptive != "coverage":
            return super().adaptive_count(evidence, order)
        assert order.coverage is not None
        # One more than there are steps where none reaches the threshold: more capacity decides.
        reached = jnp.pad(order.coverage >= self.threshold, ((0, 0), (0, 1)), constant_values=True)
        return jnp.argmax(reached, axis=-1).astype(jnp.int32) + 1

    def order(self, evidence: Evidence, available: jax.Array, steps: int) -> Order:
        """By the largest gain in coverage."""
        similarity = jnp.maximum(greedy.cosines(evidence.hidden), 0)
        # Rows of padding are covered by nothing and need not be.
        similarity = jnp.where(available[..., None], similarity, 0)
        weight = jnp.ones(available.shape)
        if self.alpha:
            weight = evidence.attention**self.alpha
        patches, covered = greedy.coverage(similarity, weight, available, steps, block=self.block)
        share = available.mean(-1, keepdims=True)
        return Order(patches, covered / jnp.maximum(share, 1e-8))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DivPrune(SetRule):
    """Farthest-point sampling of the patches (arXiv 2503.02175).

    Attributes:
      features: what distance is measured on: `projected` is the paper's, `hidden` costs no
        projection of patches that are dropped.
    """

    features: Literal["projected", "hidden"] = "projected"

    @property
    def needs(self) -> frozenset[str]:
        """The projected patches, where they are what is measured."""
        return frozenset({"projected"} if self.features == "projected" else ())

    def order(self, evidence: Evidence, available: jax.Array, steps: int) -> Order:
        """By the largest distance from all that are kept."""
        features = evidence.projected if self.features == "projected" else evidence.hidden
        assert features is not None
        return Order(greedy.farthest_points(greedy.cosines(features), available, steps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Top(SetRule):
    """The most attended patches (FasterVLM, arXiv 2412.01818v1).

    Attention is the mean over heads of the CLS row in the layer that made the features.
    """

    @property
    def needs(self) -> frozenset[str]:
        """The attention of every head."""
        return frozenset({"head_attention"})

    def order(self, evidence: Evidence, available: jax.Array, steps: int) -> Order:
        """By descending attention."""
        assert evidence.head_attention is not None
        return Order(greedy.top(evidence.head_attention.mean(1), available, steps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpp(SetRule):
    """Greedy determinantal point process with attention as quality (CDPruner without its text)."""

    @property
    def reads_attention(self) -> bool:
        """True: attention is the quality of a patch."""
        return True

    def order(self, evidence: Evidence, available: jax.Array, steps: int) -> Order:
        """By the largest gain in the determinant."""
        quality = unit_range(evidence.attention, available)
        kernel = quality[:, :, None] * greedy.cosines(evidence.hidden) * quality[:, None]
        return Order(greedy.determinantal(kernel, available, steps))


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdSelection(SetRule):
    """Soft non-maximum suppression of the attention (arXiv 2604.05601).

    Attributes:
      gamma: how fast suppression falls off with distance.
    """

    gamma: Annotated[float, Bounds(0.0, 1e6)] = 20.0

    @property
    def reads_attention(self) -> bool:
        """True: attention is what is suppressed."""
        return True

    def order(self, evidence: Evidence, available: jax.Array, steps: int) -> Order:
        """By what is left of the attention."""
        score = unit_range(evidence.attention, available)
        similarity = greedy.cosines(evidence.hidden)
        return Order(greedy.soft_suppression(score, similarity, available, steps, gamma=self.gamma))


def nearest_slot(hidden: jax.Array, patch_indices: jax.Array, available: jax.Array) -> jax.Array:
    """The slot of the kept patch that is most similar to each patch, [B, N] int32.

    Args:
      hidden: [B, N, D].
      patch_indices: [B, R] int32, the kept patches, -1 for an empty slot.
      available: [B, N] bool; others have the slot -1.
    """
    similarity = greedy.cosines(selection.rows(hidden, patch_indices), hidden)
    similarity = jnp.where((patch_indices >= 0)[..., None], similarity, -jnp.inf)
    own = patch_indices[..., None] == jnp.arange(hidden.shape[1])
    nearest = jnp.argmax(jnp.where(own, jnp.inf, similarity), axis=1)
    return jnp.where(available, nearest, -1).astype(jnp.int32)


def merge_mean(
    hidden: jax.Array, kept: VisualTokens, available: jax.Array, *, with_size: bool
) -> VisualTokens:
    """Means of the kept patches and of those nearest to each.

    Args:
      hidden: [B, N, D].
      kept: unmerged patches.
      available: [B, N] bool, patches that are no padding.
      with_size: whether log(patches in a token) follows as one more column.
    """
    slot_of = nearest_slot(hidden, kept.patch_indices, available)
    valid = jnp.arange(kept.patch_indices.shape[1]) < kept.lengths[:, None]
    joins = (slot_of[:, None] == jnp.arange(valid.shape[1])[:, None]) & valid[..., None]
    size = jnp.maximum(joins.sum(-1, keepdims=True), 1).astype(jnp.float32)
    means = selection.weighted_sum(joins / size, hidden).astype(hidden.dtype)
    tokens = jnp.where(size > 1, means, kept.tokens)
    if with_size:
        tokens = jnp.concatenate([tokens, jnp.log(size).astype(tokens.dtype)], axis=-1)
    return kept._replace(tokens=jnp.where(valid[..., None], tokens, 0))


def unit_range(score: jax.Array, available: jax.Array) -> jax.Array:
    """Scores [B, N] of the available patches scaled to 0..1; equal ones all become 0."""
    low = jnp.where(available, score, jnp.inf).min(-1, keepdims=True)
    high = jnp.where(available, score, -jnp.inf).max(-1, keepdims=True)
    span = high - low
    return jnp.where(available & (span > 0), (score - low) / jnp.where(span > 0, span, 1), 0)


register("cover", Cover)
register("divprune", DivPrune)
register("dpp", Dpp)
register("idselection", IdSelection)
register("top", Top)
