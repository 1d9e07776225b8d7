"""What plans of inference assume of the data: the mean number of visual tokens per image of each
reduction, lengths of text, and the largest image."""

from collections.abc import Iterator
from typing import NamedTuple

from prumerge_jax import reductions
from prumerge_jax.data.anyres import Window, shrunk_size
from prumerge_jax.data.layout import Layout
from prumerge_jax.engine.shapes import most_visual_tokens
from prumerge_jax.models.config import LlavaConfig, VisionConfig
from prumerge_jax.reductions import Reduction

PUBLISHED = {"prumerge": 40, "prumerge+": 144, "random": 40, "uniform": 40}
"""Means over images of 576 patches, from the paper (arXiv 2403.15388); the baselines keep as many
tokens as `prumerge`."""
PUBLISHED_PATCHES = 576
ASSUMED_CROPS = 5
"""Crops of an image of 640 x 480 at dynamic resolution."""
ASSUMED_TEXT_TOKENS, ASSUMED_NEW_TOKENS = 60, 64
"""Tokens of a question and of its answer, where the engine's lengths are left open."""
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
    reductions.require_before_decoder(reduction, "planning")
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


def mean_of_image(spelling: str, model: LlavaConfig, crops: int) -> MeanTokens:
    """`mean_visual_tokens` of all crops of an image."""
    mean, reason = mean_visual_tokens(spelling, model.vision)
    if crops == 1:
        return MeanTokens(mean, reason)
    return MeanTokens(crops * mean, f"{reason}, in {crops} crops")


def crops_of_image(model: LlavaConfig) -> int:
    """Crops that a plan assumes of an image."""
    return ASSUMED_CROPS if model.image_grid_pinpoints else 1


def decoded_tokens(visual: MeanTokens) -> float:
    """Mean tokens of a sequence that is being decoded: half of its answer is there."""
    return visual.mean + ASSUMED_TEXT_TOKENS + ASSUMED_NEW_TOKENS / 2


def largest_layout(model: LlavaConfig, reduction: Reduction) -> Layout:
    """The layout of most visual tokens that an image's size can lead to."""
    return max(_layouts(model), key=lambda layout: most_visual_tokens(reduction, layout))


def _layouts(model: LlavaConfig) -> Iterator[Layout]:
    """Every layout that an image's size can lead to, and none that has fewer tokens."""
    grid, side = model.vision.grid, model.vision.image_size
    if not model.image_grid_pinpoints:
        yield Layout(grid)
    for height, width in model.image_grid_pinpoints:
        tiles = (height // side, width // side)
        rows, columns = tiles[0] * grid, tiles[1] * grid
        # An image fills its resolution in one direction.
        windows = [Window(0, row, 0, columns) for row in range(1, rows + 1)]
        windows += [Window(0, rows, 0, column) for column in range(1, columns)]
        for window in windows:
            shape = shrunk_size(window, grid, model.anyres_max)
            yield Layout(grid, tiles, window, shape, newline=model.image_newline)
