"""PruMerge and its published settings, `full` among them, as reductions."""

import dataclasses
from typing import Annotated, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp

from prumerge_jax import prumerge, selection
from prumerge_jax.options import Bounds
from prumerge_jax.reductions.base import Assignment, Evidence, Reduction
from prumerge_jax.reductions.registry import register
from prumerge_jax.reductions.temporal import merge_frames

_ATTENTION = {
    ("23", "wide"): "attention",
    ("23", "mean"): "last_head_attention",
    ("22", "wide"): "feature_attention",
    ("22", "mean"): "head_attention",
}
"""Which field of the evidence has the attention of a layer and its heads."""


class _Seen(NamedTuple):
    """The arguments of `prumerge.reduce_tokens`."""

    hidden: jax.Array
    keys: jax.Array
    attention: jax.Array
    present: jax.Array | None
    tubes: prumerge.Tubes | None = None


@dataclasses.dataclass(frozen=True)
class PruMerge(prumerge.PruMergeConfig, Reduction):
    """`prumerge.reduce_tokens` with these parameters.

    Attributes:
      layer: whose attention decides, numbered as in a tower of 24 layers: `23` is the last one, as
        in the reference code, `22` the one that made the features.
      heads: `wide` is one head as wide as the tower, as in the reference code; `mean` the mean over
        the tower's own heads.
      temporal: similarity from which a patch of a video is merged into the one at its place in the
        frame before, see `temporal.merge_frames`; above 1 none is. None: every frame by itself.
      keep_cls: see `Reduction.frame_cls`; None: where nothing is pruned.
    """

    layer: Literal["23", "22"] = "23"
    heads: Literal["wide", "mean"] = "wide"
    temporal: Annotated[float, Bounds(0, 2)] | None = None
    keep_cls: bool | None = None

    @property
    def needs(self) -> frozenset[str]:
        """The attention, if it is another than the reference code's."""
        field = _ATTENTION[self.layer, self.heads]
        return frozenset() if field == "attention" else frozenset({field})

    @property
    def varying(self) -> bool:
        """Whether outliers decide how many patches are kept."""
        return self.count_rule == "iqr"

    @property
    def selects_patches(self) -> bool:
        """Whether some patches are kept and others are not."""
        return self.count_rule != "all"

    @property
    def raster_order(self) -> bool:
        """Whether tokens come in the order of their patches."""
        return self.order == "raster"

    @property
    def merges_frames(self) -> bool:
        """Whether `temporal` is set."""
        return self.temporal is not None and self.selects_patches

    @property
    def frame_cls(self) -> bool:
        """`keep_cls`, if it is set."""
        return not self.selects_patches if self.keep_cls is None else self.keep_cls

    def most_outliers(self, num_patches: int) -> int:
        """All patches where frames are merged: means are compared with another frame's quartiles
        than those of what they are means of."""
        return num_patches if self.merges_frames else super().most_outliers(num_patches)

    def attention(self, evidence: Evidence) -> jax.Array:
        """The attention that decides, [B, N] float32."""
        attention = getattr(evidence, _ATTENTION[self.layer, self.heads])
        return attention.mean(1) if self.heads == "mean" else attention

    def uncapped(self) -> Self:
        """The same parameters without a capacity."""
        return dataclasses.replace(self, capacity=None)

    def reduce(self, evidence: Evidence) -> prumerge.VisualTokens:
        """Selects and merges the patches of every image."""
        seen = self._seen(evidence)
        return prumerge.reduce_tokens(
            seen.hidden, seen.keys, seen.attention, self, seen.present, seen.tubes
        )

    def _seen(self, evidence: Evidence) -> "_Seen":
        """What is reduced: patches, or where frames are merged their tubes.

        Quartiles are those of a frame's own attention; all else is of its tubes.
        """
        attention = self.attention(evidence)
        first_frame = evidence.first_frame
        if self.temporal is None or not self.merges_frames or first_frame is None:
            return _Seen(evidence.hidden, evidence.keys, attention, evidence.present)
        rank = selection.descending_rank(attention)
        bound = selection.outlier_bound(attention, rank, self.iqr_factor)
        merged = merge_frames(evidence.hidden, evidence.keys, attention, first_frame, self.temporal)
        return _Seen(
            merged.hidden.astype(evidence.hidden.dtype),
            merged.keys,
            merged.attention,
            merged.fresh,
            prumerge.Tubes(bound, merged.fresh.all(-1)),
        )

    def explain(self, evidence: Evidence) -> Assignment:
        """Kept patches, and for the others the most similar token that takes them in."""
        seen = self._seen(evidence)
        chosen = prumerge.select(seen.attention, self, seen.present, seen.tubes)
        targets = merge_targets(seen.keys, chosen, self)
        return Assignment(chosen.patch_indices, targets, chosen.kept)


def merge_targets(
    keys: jax.Array, chosen: prumerge.Selection, config: prumerge.PruMergeConfig
) -> jax.Array:
    """The slot of the token to which every patch contributes most.

    Args:
      keys: [B, N, D], keys of the last block, without CLS.
      chosen: from `prumerge.select`.
      config: the method's parameters.

    Returns:
      [B, N] int32: for a kept patch its own slot, for a pruned one the slot of the most similar
      token that takes it in, -1 where none does.
    """
    capacity = chosen.patch_indices.shape[1]
    own = chosen.patch_indices[..., None] == jnp.arange(keys.shape[1])
    if config.merge == "none":
        claims = jnp.where(own, 1.0, -jnp.inf)
    else:
        comparable = prumerge.comparable(keys, config)
        kept = selection.rows(comparable, chosen.patch_indices)
        similarity = selection.einsum("brd,bnd->brn", kept, comparable)
        is_kept = jnp.arange(capacity)[:, None] < chosen.kept[:, None, None]
        taken = (prumerge.nearest(keys, chosen, config) > 0) & chosen.pruned[:, None] & is_kept
        claims = jnp.where(taken, similarity, jnp.where(own, jnp.inf, -jnp.inf))
    return jnp.where(claims.max(1) > -jnp.inf, claims.argmax(1), -1).astype(jnp.int32)


for _name, _values in prumerge.PRESETS.items():
    register(_name, PruMerge, **_values)
