"""Reductions that group patches: VisionZip, HoloV and PACT's clusters."""

import dataclasses
from typing import Annotated, Self

import jax.numpy as jnp

from prumerge_jax import selection
from prumerge_jax.options import Bounds, check
from prumerge_jax.prumerge import VisualTokens
from prumerge_jax.reductions import clustering
from prumerge_jax.reductions.base import (
    Evidence,
    Reduction,
    all_available,
    finite_images,
    kept_rows,
    without_nan,
    zero_unless,
)
from prumerge_jax.reductions.registry import register
from prumerge_jax.reductions.set_rules import Tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionZip(Reduction):
    """The CLS token, the most attended patches, and contextual tokens (arXiv 2412.04467).

    A contextual token is a patch plus the mean of the patches most similar to it, as in the
    authors' code; the paper says average.

    Attributes:
      dominant: patches of the largest attention, kept as they are.
      contextual: tokens that the others are added up in.
      cls_token: whether the CLS token comes first, as in the authors' code.
    """

    dominant: Tokens = 53
    contextual: Tokens = 10
    cls_token: bool = True

    def __post_init__(self) -> None:
        check(self)

    @property
    def needs(self) -> frozenset[str]:
        """Attention and keys of the layer that made the features, and its CLS token."""
        return frozenset({"head_attention", "feature_keys", "cls"})

    @property
    def raster_order(self) -> bool:
        """False: contextual tokens follow the dominant ones."""
        return False

    def capacity_for(self, num_patches: int) -> int:
        """R: all tokens, of small images as many as there are patches."""
        return min(self.dominant + self.contextual, num_patches) + self.cls_token

    def reduce(self, evidence: Evidence) -> VisualTokens:
        """CLS, dominant patches in raster order, contextual tokens in raster order."""
        attention, keys, cls = evidence.head_attention, evidence.feature_keys, evidence.cls
        assert attention is not None
        assert keys is not None
        assert cls is not None
        finite = finite_images(evidence.hidden, attention, keys)
        attention, keys, hidden = (
            zero_unless(finite, x) for x in (attention, keys, evidence.hidden)
        )
        batch, num_patches, _ = hidden.shape
        dominant = min(self.dominant, num_patches)
        contextual = min(self.contextual, num_patches - dominant)
        if contextual:
            metric = keys.reshape(batch, num_patches, attention.shape[1], -1).mean(2)
            groups = clustering.contextual(attention.sum(1), metric, dominant, contextual)
            kept, merged = groups.dominant, selection.weighted_sum(groups.weights, hidden)
            patches = jnp.concatenate([kept, groups.targets], axis=1)
            tokens = [selection.rows(hidden, kept).astype(jnp.float32), merged]
        else:
            patches = jnp.broadcast_to(jnp.arange(num_patches), (batch, num_patches))
            tokens = [hidden.astype(jnp.float32)]
        if self.cls_token:
            patches = jnp.concatenate([jnp.full((batch, 1), -1), patches], axis=1)
            tokens = [cls[:, None].astype(jnp.float32), *tokens]
        count = jnp.where(finite, patches.shape[1], -1).astype(jnp.int32)
        joined = jnp.concatenate(tokens, axis=1).astype(hidden.dtype)
        return VisualTokens(
            tokens=jnp.where(finite[:, None, None], joined, 0),
            lengths=jnp.maximum(count, 0),
            patch_indices=jnp.where(finite[:, None], patches, -1).astype(jnp.int32),
            required=count,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class HoloV(Reduction):
    """Tokens shared out over raster runs by attention and variety (arXiv 2510.02912).

    Attributes:
      tokens: patches kept per image.
      crops: raster runs that the image is cut into.
      alpha: weight of the variety of a run's patches.
    """

    tokens: Tokens = 64
    crops: Annotated[int, Bounds(1, 1024)] = 16
    alpha: Annotated[float, Bounds(0.0, 1e3)] = 0.09

    def __post_init__(self) -> None:
        check(self)

    @property
    def needs(self) -> frozenset[str]:
        """Attention of the layer that made the features, and the projected patches."""
        return frozenset({"head_attention", "projected"})

    def capacity_for(self, num_patches: int) -> int:
        """R: the tokens that are kept."""
        return min(self.tokens, num_patches)

    def reduce(self, evidence: Evidence) -> VisualTokens:
        """The kept patches in raster order."""
        projected, attention = evidence.projected, evidence.head_attention
        assert projected is not None
        assert attention is not None
        num_patches = evidence.hidden.shape[1]
        tokens = self.capacity_for(num_patches)
        finite = finite_images(projected, attention)
        kept = clustering.crop_shares(
            zero_unless(finite, projected),
            zero_unless(finite, attention).mean(1),
            crops=min(self.crops, num_patches),
            tokens=tokens,
            alpha=self.alpha,
        )
        count = jnp.where(finite, kept.sum(-1), -1).astype(jnp.int32)
        return kept_rows(evidence.hidden, clustering.raster(kept, tokens), count)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pact(Reduction):
    """Means of clusters of patches whose keys are near each other (arXiv 2504.08966, DBDPC).

    PACT clusters inside the decoder; here the tower's last keys are clustered before it. Counts
    follow the image, without attention.

    Attributes:
      cutoff: the most that a patch is away from its cluster's centre, 1 less their cosine.
      capacity: R; None is one token per patch.
    """

    cutoff: Annotated[float, Bounds(0.0, 2.0)] = 0.21
    capacity: Tokens | None = None

    def __post_init__(self) -> None:
        check(self)

    @property
    def varying(self) -> bool:
        """True: an image has as many clusters as it needs."""
        return True

    def capacity_for(self, num_patches: int) -> int:
        """R: the capacity, or one token per patch."""
        return num_patches if self.capacity is None else min(self.capacity, num_patches)

    def uncapped(self) -> Self:
        """The same clusters without a capacity."""
        return dataclasses.replace(self, capacity=None)

    def reduce(self, evidence: Evidence) -> VisualTokens:
        """Means of the clusters in the raster order of their centres."""
        num_patches = evidence.hidden.shape[1]
        capacity = self.capacity_for(num_patches)
        finite = finite_images(evidence.hidden, evidence.keys)
        evidence = without_nan(evidence, finite)
        present = all_available(evidence)
        clusters = clustering.density_peaks(evidence.keys, present, self.cutoff)
        centres = clustering.raster(clusters.is_centre, capacity)
        joins = (clusters.centre[:, None] == centres[..., None]) & present[:, None]
        size = joins.sum(-1, keepdims=True)
        means = selection.weighted_sum(joins / jnp.maximum(size, 1), evidence.hidden)
        count = jnp.where(finite, clusters.is_centre.sum(-1), -1).astype(jnp.int32)
        valid = jnp.arange(capacity) < count[:, None]
        return VisualTokens(
            tokens=jnp.where(valid[..., None], means, 0).astype(evidence.hidden.dtype),
            lengths=jnp.clip(count, 0, capacity),
            patch_indices=jnp.where(valid, centres, -1),
            required=count,
        )


register("visionzip", VisionZip)
register("holov", HoloV)
register("pact", Pact)
