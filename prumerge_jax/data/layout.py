"""Layout: how the crops of one image make up its visual tokens.

Shapes: C crops of the image, N patches per crop.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from prumerge_jax.data.anyres import (
    Size,
    Window,
    covered_window,
    select_resolution,
    shrunk_size,
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The crops of an image: the whole image, then tiles of it row by row, if any. Or the frames of
    a video.

    The patches of all tiles together are the mosaic.

    Attributes:
      grid: patches along one side of a crop; N is its square.
      tiles: rows and columns of tiles.
      window: the patches of the mosaic that lie on the image; the others are black edges.
      shape: rows and columns of tokens that the window has where nothing is pruned; fewer than its
        own where the mosaic is shrunk.
      newline: whether, where nothing is pruned, a newline ends every row of the mosaic, or the
        image if it has no tiles, or the video.
      frames: number of frames of a video; 0 for an image.
      pooled: tokens along one side of a frame.
      cls: whether the tower's CLS feature stands in front of each frame where nothing is pruned.
    """

    grid: int
    tiles: tuple[int, int] = (0, 0)
    window: Window = Window(0, 0, 0, 0)
    shape: tuple[int, int] = (0, 0)
    newline: bool = False
    frames: int = 0
    pooled: int = 0
    cls: bool = False

    @property
    def num_patches(self) -> int:
        """N, patches of a crop."""
        return self.grid**2

    @property
    def num_crops(self) -> int:
        """C, crops of the image."""
        return self.frames or 1 + self.tiles[0] * self.tiles[1]

    @property
    def tokens_of_frame(self) -> int:
        """Tokens of a frame where nothing is pruned."""
        return self.pooled**2 + self.cls

    @property
    def span(self) -> int:
        """Tokens of the image where nothing is pruned, newlines included."""
        if self.frames:
            return self.frames * self.tokens_of_frame + self.newline
        rows, columns = self.shape
        newlines = rows if any(self.tiles) else 1
        return self.num_patches + rows * columns + self.newline * newlines

    def on_image(self) -> np.ndarray:
        """bool [C, N]: patches that lie on the image; all of the first crop do."""
        if self.frames:
            return np.ones((self.frames, self.num_patches), bool)
        row, column = self.mosaic_places()
        inside = (row >= self.window.top) & (row < self.window.bottom)
        inside &= (column >= self.window.left) & (column < self.window.right)
        inside[0] = True
        return inside

    def mosaic_places(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and column of every patch in the mosaic, int32 [C, N] both; -1 in the first crop."""
        rows, columns = (tiles * self.grid for tiles in self.tiles)
        places = np.indices((rows, columns), np.int32)
        by_tile = places.reshape(2, self.tiles[0], self.grid, self.tiles[1], self.grid)
        by_tile = by_tile.swapaxes(2, 3).reshape(2, self.num_crops - 1, self.num_patches)
        none = np.full((2, 1, self.num_patches), -1, np.int32)
        row, column = np.concatenate([none, by_tile], axis=1)
        return row, column

    def tile_of_patch(self) -> np.ndarray:
        """int32 [N]: the tile in whose part of the whole image every patch's middle lies, as the
        number of its crop, from 1. Black edges are not in the whole image."""
        middle, window = 2 * np.arange(self.grid, dtype=np.int32) + 1, self.window
        row = (2 * self.grid * window.top + middle * window.rows) // (2 * self.grid**2)
        column = (2 * self.grid * window.left + middle * window.columns) // (2 * self.grid**2)
        return 1 + (row[:, None] * self.tiles[1] + column).reshape(-1)

    def window_of(self, tiles: np.ndarray) -> np.ndarray:
        """The window's part of the mosaic of values [C - 1, N], one per patch of the tiles."""
        by_tile = tiles.reshape(*self.tiles, self.grid, self.grid)
        mosaic = by_tile.swapaxes(1, 2).reshape([tiles * self.grid for tiles in self.tiles])
        window = self.window
        return mosaic[window.top : window.bottom, window.left : window.right]

    def positions(self) -> np.ndarray:
        """int32 [C, N]: the position of every patch among the `span` tokens of the whole image.

        Several patches of a mosaic that is shrunk share one. Patches beyond the window have that of
        the nearest in it. Of a video [F, tokens along a side squared]: the patches of frames are
        pooled first.
        """
        if self.frames:
            first = np.arange(self.frames, dtype=np.int32)[:, None] * self.tokens_of_frame
            return first + self.cls + np.arange(self.pooled**2, dtype=np.int32)
        row, column = self.mosaic_places()
        rows, columns = self.shape
        window = self.window
        row = np.clip(row - window.top, 0, max(window.rows - 1, 0))
        column = np.clip(column - window.left, 0, max(window.columns - 1, 0))
        row = (2 * row + 1) * rows // max(2 * window.rows, 1)  # of its middle
        column = (2 * column + 1) * columns // max(2 * window.columns, 1)
        positions = self.num_patches + row * (columns + self.newline) + column
        positions[0] = np.arange(self.num_patches)
        return np.minimum(positions, self.span - 1).astype(np.int32)

    def newline_positions(self, row: np.ndarray) -> np.ndarray:
        """The position of the newline that ends the row of the mosaic with each number [n]."""
        rows, columns = self.shape
        row = (2 * (row - self.window.top) + 1) * rows // max(2 * self.window.rows, 1)
        return self.num_patches + row * (columns + 1) + columns


def anyres_layout(
    size: Size,
    pinpoints: Sequence[Size],
    tile_size: int,
    grid: int,
    *,
    most_tiles: int | None = None,
    source: str = "hf",
) -> Layout:
    """The layout of an image at dynamic resolution (LLaVA-NeXT, LLaVA-OneVision).

    Args:
      size: the image's height and width in pixels.
      pinpoints: see `anyres.select_resolution`.
      tile_size: S, side of a crop in pixels.
      grid: patches along one side of a crop.
      most_tiles: see `anyres.shrunk_size`.
      source: see `anyres.covered_window`.
    """
    high, wide = select_resolution(size, pinpoints)
    tiles = (high // tile_size, wide // tile_size)
    window = covered_window(size, tiles[0] * grid, tiles[1] * grid, source)
    return Layout(grid, tiles, window, shrunk_size(window, grid, most_tiles), newline=True)
