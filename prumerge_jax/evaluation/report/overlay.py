"""An overlay: which patches of an image a reduction keeps, and what it merges into them."""

import colorsys
from collections.abc import Iterable, Mapping, Sequence

import matplotlib.patheffects
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

PANEL_INCHES = 6.5
SMALL_PANEL_INCHES = 3.25
DOTS_PER_INCH = 150
DIM = 0.3
"""Brightness of a patch that was not kept."""
TINT = 0.55
"""Share of the kept token's colour in the patches that merge into it."""
_GOLDEN_RATIO = 0.618034


def overlay(pixels: np.ndarray, patch_indices: np.ndarray, assignment: np.ndarray) -> Figure:
    """Three panels: the image, the kept patches in order, and what merges into which of them.

    Args:
      pixels: uint8 [S, S, 3], the image as the vision tower saw it.
      patch_indices: int32 [n], the kept patches in the order of keeping, numbered row by row. A
        patch that was kept twice shows its first number.
      assignment: int32 [N], for each patch the index into `patch_indices` of the kept token that it
        merges into, -1 for none; a kept patch has the index of its token.

    Returns:
      The figure, to be saved with `savefig`. Kept patches carry their place in the order, from 1;
      in the last panel all patches that merge into one have its colour and its number.

    Raises:
      ValueError: the arrays do not fit together.
    """
    if not patch_indices.size:
        raise ValueError("patch_indices names no patch; expected 1 or more, no padding")
    return overlays([(pixels, patch_indices, assignment)])


def overlays(explained: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Figure:
    """The panels of `overlay` for every crop of an image or frame of a video, one below the other.

    Args:
      explained: arguments of `overlay` for each; a crop may keep no patch at all.

    Raises:
      ValueError: the arrays do not fit together.
    """
    rows = len(explained)
    size = PANEL_INCHES if rows == 1 else SMALL_PANEL_INCHES
    figure = Figure(figsize=(3 * size, rows * (size + 0.5)), dpi=DOTS_PER_INCH)
    figure.subplots_adjust(
        left=0.005, right=0.995, bottom=0.01 / rows, top=1 - 0.07 / rows, wspace=0.02
    )
    panels = figure.subplots(rows, 3, squeeze=False)
    for number, (of_crop, each) in enumerate(zip(panels, explained, strict=True)):
        what = "image" if rows == 1 else f"crop or frame {number}"
        _draw_crop(of_crop, *each, what, size)
    return figure


def _draw_crop(
    panels: np.ndarray,
    pixels: np.ndarray,
    patch_indices: np.ndarray,
    assignment: np.ndarray,
    what: str,
    inches: float,
) -> None:
    """Draws into three axes, each `inches` wide."""
    grid = _check(pixels, patch_indices, assignment)
    is_kept = np.isin(np.arange(grid**2), patch_indices)
    is_pruned_and_merged = (assignment >= 0) & ~is_kept
    image, kept, merged = panels
    for axes, drawn, title in (
        (image, pixels, f"{what}, {grid**2} patches"),
        (kept, _lit(pixels, is_kept), f"{is_kept.sum()} kept, numbered in order"),
        (
            merged,
            _tinted(pixels, assignment, len(patch_indices)),
            f"{is_pruned_and_merged.sum()} pruned merge into the kept one of that number",
        ),
    ):
        axes.imshow(drawn, extent=(0, grid, grid, 0))  # one unit is one patch
        axes.set_title(title, fontsize=None if inches == PANEL_INCHES else "small")
        axes.axis("off")

    order = list(enumerate(patch_indices.tolist()))
    slots = {patch: slot for slot, patch in reversed(order)}  # the first slot of each patch wins
    font = min(72 * inches / grid * min(0.5, 1.25 / len(str(len(order)))), 16.0)
    for axes, frame_width in ((kept, 0.6), (merged, 1.4)):
        _draw_frames(axes, slots, grid, frame_width)
        _draw_numbers(axes, slots, grid, font)
    pruned = np.flatnonzero(is_pruned_and_merged).tolist()
    _draw_numbers(merged, {patch: int(assignment[patch]) for patch in pruned}, grid, 0.7 * font)


def _check(pixels: np.ndarray, patch_indices: np.ndarray, assignment: np.ndarray) -> int:
    """The patches along one side; raises ValueError where the arrays contradict each other."""
    size = pixels.shape[0]
    if pixels.dtype != np.uint8 or pixels.shape != (size, size, 3):
        raise ValueError(f"pixels is {pixels.dtype} {pixels.shape}; expected uint8 [S, S, 3]")
    grid = round(assignment.size**0.5)
    if assignment.ndim != 1 or grid**2 != assignment.size or not grid or size % grid:
        raise ValueError(
            f"assignment has shape {assignment.shape}; expected [N], N the square of a number "
            f"that divides the image's side {size}"
        )
    count = patch_indices.size
    if count and (patch_indices.min() < 0 or patch_indices.max() >= assignment.size):
        raise ValueError(
            f"patch_indices must name patches from 0 to {assignment.size - 1}, no padding"
        )
    if assignment.min() < -1 or assignment.max() >= count:
        raise ValueError(f"assignment must be between -1 and {count - 1}, the last kept token")
    own = patch_indices[assignment[patch_indices]]
    if (own != patch_indices).any():
        patch = int(patch_indices[np.argmax(own != patch_indices)])
        raise ValueError(f"kept patch {patch} is assigned to another token")
    return grid


def _colours(count: int) -> np.ndarray:
    """RGB [count, 3] in 0..1; neighbours in the order are far apart on the colour circle."""
    hues = (np.arange(count) * _GOLDEN_RATIO) % 1.0
    values = (1.0, 0.7, 0.85)
    return np.array(
        [colorsys.hsv_to_rgb(hue, 0.9, values[slot % 3]) for slot, hue in enumerate(hues)]
    )


def _per_pixel(per_patch: np.ndarray, size: int) -> np.ndarray:
    """[N, C] -> [size, size, C], each patch a block of equal pixels."""
    grid = round(len(per_patch) ** 0.5)
    block = size // grid
    return per_patch.reshape(grid, grid, -1).repeat(block, axis=0).repeat(block, axis=1)


def _lit(pixels: np.ndarray, is_kept: np.ndarray) -> np.ndarray:
    """The image, dim where a patch was not kept."""
    brightness = np.where(is_kept, 1.0, DIM)[:, None]
    return (pixels * _per_pixel(brightness, len(pixels))).astype(np.uint8)


def _tinted(pixels: np.ndarray, assignment: np.ndarray, count: int) -> np.ndarray:
    """The image in grey, in the kept token's colour where a patch merges, dim where it does not."""
    is_merged = (assignment >= 0)[:, None]
    colour = np.where(is_merged, 255 * TINT * _colours(max(count, 1))[assignment], 0.0)
    brightness = np.where(is_merged, 1 - TINT, DIM)
    grey = pixels.mean(axis=-1, keepdims=True)
    size = len(pixels)
    return (grey * _per_pixel(brightness, size) + _per_pixel(colour, size)).astype(np.uint8)


def _draw_numbers(axes: Axes, slots: Mapping[int, int], grid: int, font: float) -> None:
    """Writes into each patch of `slots` its slot, counted from 1."""
    outline = [matplotlib.patheffects.withStroke(linewidth=font / 5, foreground="black")]
    for patch, slot in slots.items():
        axes.text(
            patch % grid + 0.5,
            patch // grid + 0.5,
            str(slot + 1),
            fontsize=font,
            color="white",
            ha="center",
            va="center",
            path_effects=outline,
        )


def _draw_frames(axes: Axes, patches: Iterable[int], grid: int, width: float) -> None:
    for patch in patches:
        corner = (patch % grid, patch // grid)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="white", linewidth=width))
