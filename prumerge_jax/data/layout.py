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
    """The crops of an image: the whole image, then tiles of it row by row, if any.

    The patches of all tiles together are the mosaic.

    Attributes:
      grid: patches along one side of a crop; N is its square.
      tiles: rows and columns of tiles.
      window: the patches of the mosaic that lie on the image; the others are black edges.
      shape: rows and columns of tokens that the window has where nothing is pruned; fewer than its
        own where the mosaic is shrunk.
      newline: whether, where nothing is pruned, a newline ends every row of the mosaic, or the
        image if it has no tiles.
    """

    grid: int
    tiles: tuple[int, int] = (0, 0)
    window: Window = Window(0, 0, 0, 0)
    shape: tuple[int, int] = (0, 0)
    newline: bool = False

    @property
    def num_patches(self) -> int:
        """N, patches of a crop."""
        return self.grid**2

    @property
    def num_crops(self) -> int:
        """C, crops of the image."""
        return 1 + self.tiles[0] * self.tiles[1]

    @property
    def span(self) -> int:
        """Tokens of the image where nothing is pruned, newlines included."""
        rows, columns = self.shape
        newlines = rows if any(self.tiles) else 1
        return self.num_patches + rows * columns + self.newline * newlines

    def on_image(self) -> np.ndarray:
        """bool [C, N]: patches that lie on the image; all of the first crop do."""
        whole = np.ones((1, self.num_patches), bool)
        rows, columns = (tiles * self.grid for tiles in self.tiles)
        mosaic = np.zeros((rows, columns), bool)
        mosaic[self.window.top : self.window.bottom, self.window.left : self.window.right] = True
        by_tile = mosaic.reshape(self.tiles[0], self.grid, self.tiles[1], self.grid)
        tiles = by_tile.transpose(0, 2, 1, 3).reshape(self.num_crops - 1, self.num_patches)
        return np.concatenate([whole, tiles])


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
