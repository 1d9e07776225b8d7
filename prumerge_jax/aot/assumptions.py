"""What plans assume of the data: the mean number of visual tokens per image of each reduction."""

from typing import NamedTuple

from prumerge_jax import reductions
from prumerge_jax.models.config import VisionConfig

PUBLISHED = {"prumerge": 40, "prumerge+": 144, "random": 40, "uniform": 40}
"""Means over images of 576 patches, from the paper (arXiv 2403.15388); the baselines keep as many
tokens as `prumerge`."""
PUBLISHED_PATCHES = 576
KEEP_THE_COUNT = frozenset(
    {"capacity", "merge", "neighbours", "order", "pool", "ranking", "seed", "similarity"}
)
"""Parameters of PruMerge on which the number of tokens does not depend."""


class MeanTokens(NamedTuple):
    """An assumed mean.

    Attributes:
      mean: visual tokens per image.
      reason: where the figure is from, for the printed plan.
    """

    mean: float
    reason: str


def mean_visual_tokens(spelling: str, vision: VisionConfig) -> MeanTokens:
    """The mean that a plan assumes of a reduction: published, or else its capacity.

    Args:
      spelling: spelling of the reduction.
      vision: the tower; for another number of patches than 576 the published share is kept.

    Raises:
      ValueError: the reduction is not valid, or the tower cannot provide for it.
    """
    reduction = reductions.parse(spelling)
    side = reduction.image_size(vision.image_size, vision.patch_size) // vision.patch_size
    capacity = reduction.capacity_for(side**2)
    name, _, written = spelling.partition(":")
    changed = {part.partition("=")[0] for part in written.split(",") if part}
    if name not in PUBLISHED or changed - KEEP_THE_COUNT:
        is_bound = reduction.varying
        return MeanTokens(capacity, "the most it can need" if is_bound else "fixed")
    mean = PUBLISHED[name] * side**2 / PUBLISHED_PATCHES
    if mean > capacity:
        return MeanTokens(capacity, "its capacity")
    return MeanTokens(mean, f"the paper's mean for {name}")
