"""Dynamic resolution: which tiles an image is cut into, and which of their patches it covers.

LLaVA-NeXT's `anyres` and LLaVA-OneVision's `anyres_max_N` as sizes alone, without a pixel.
Sources: transformers `image_processing_llava_next.py`, `modeling_llava_next.py` and
`modeling_llava_onevision.py`; the original `llava/mm_utils.py` and `llava_arch.py`.

All sizes are (height, width). Shares are taken in float64 in the order of the sources: another
order decides some sizes otherwise.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

Size = tuple[int, int]


class Window(NamedTuple):
    """Rows `top` to `bottom` and columns `left` to `right` of a grid, the ends not included."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.bottom - self.top

    @property
    def columns(self) -> int:
        """Number of columns."""
        return self.right - self.left


def select_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The resolution that shows most of an image, and of those the one that wastes least.

    Ties go to the earlier one. Pixels that only enlargement makes do not count, so that small
    images tie.

    Args:
      size: the image's, in pixels.
      pinpoints: resolutions to choose from, in pixels.
    """
    height, width = size
    best, most, least = pinpoints[0], -1, 0
    for high, wide in pinpoints:
        scale = min(wide / width, high / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        wasted = high * wide - shown
        if shown > most or (shown == most and wasted < least):
            best, most, least = (high, wide), shown, wasted
    return best


def resized_inside(size: Size, resolution: Size) -> Size:
    """The size to which an image is resized, its aspect kept, to fill a resolution one way."""
    (height, width), (high, wide) = size, resolution
    scale_wide, scale_high = wide / width, high / height
    if scale_wide < scale_high:
        return min(math.ceil(height * scale_wide), high), wide
    return high, min(math.ceil(width * scale_high), wide)


def covered_window(size: Size, rows: int, columns: int, source: str = "hf") -> Window:
    """The patches of a mosaic of rows x columns that lie on the image, not on its black edges.

    Args:
      size: the image's, in pixels.
      rows, columns: patches of the whole mosaic.
      source: whose rounding, `hf` (transformers) or `original`.

    Returns:
      The window; it may have no row or no column.
    """
    digits = 7 if source == "hf" else None

    def shrunk(length: int, scale: float) -> int:
        return int(length * scale if digits is None else round(length * scale, digits))

    height, width = size
    if width / height > columns / rows:
        edge = (rows - shrunk(height, columns / width)) // 2
        return Window(edge, rows - edge, 0, columns)
    edge = (columns - shrunk(width, rows / height)) // 2
    return Window(0, rows, edge, columns - edge)


def shrunk_size(window: Window, grid: int, most_tiles: int | None) -> Size:
    """Rows and columns of tokens that remain of a window.

    Args:
      window: the image's part of the mosaic.
      grid: patches along one side of a tile.
      most_tiles: tiles' worth of tokens beyond which the window is shrunk; None for never.
    """
    rows, columns = window.rows, window.columns
    if most_tiles is None:
        return rows, columns
    times = math.sqrt(rows * columns / (most_tiles * grid**2))
    if times <= 1.1:
        return rows, columns
    return int(rows // times), int(columns // times)
