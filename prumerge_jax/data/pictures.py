"""From an image to its crops: one of the tower's size, or the tiles of dynamic resolution.

Shapes: C crops, S side of a crop in pixels.
"""

import dataclasses
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image

from prumerge_jax.data.anyres import Size, resized_inside
from prumerge_jax.data.images import (
    MAX_PIXELS,
    ImageError,
    ImageMode,
    ImageSource,
    image_size,
    load_image,
    preprocess,
)
from prumerge_jax.data.layout import Layout, anyres_layout
from prumerge_jax.messages import quoted
from prumerge_jax.models.config import LlavaConfig

PictureMode = ImageMode | Literal["anyres"]
"""`anyres`: the whole image, then the tiles of the best of the model's resolutions."""

PICTURE_MODES: tuple[str, ...] = (*get_args(ImageMode), "anyres")


class Picture(NamedTuple):
    """An image as the vision tower takes it.

    Attributes:
      crops: uint8 [C, S, S, 3].
      layout: what the crops are.
    """

    crops: np.ndarray
    layout: Layout


@dataclasses.dataclass(frozen=True)
class PictureProcessor:
    """From any image to its crops, as a model of these sizes takes them.

    Attributes:
      config: the model's sizes.
      crop_size: S, side of a crop in pixels; the tower's, unless a reduction wants others.
      mode: `anyres`, or what happens to an image that is not square.
      max_pixels: most pixels of an image that is decoded.

    Raises:
      ValueError: no such mode, or one that the model does not support.
    """

    config: LlavaConfig
    crop_size: int
    mode: PictureMode
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.mode not in PICTURE_MODES:
            raise ValueError(
                f"unknown image mode {quoted(self.mode)}; expected one of {PICTURE_MODES}"
            )
        if self.mode == "anyres" and not self.config.image_grid_pinpoints:
            raise ValueError(
                "image mode 'anyres' is for models with image_grid_pinpoints, this one has none; "
                f"expected one of {get_args(ImageMode)}"
            )
        if self.mode == "anyres" and self.crop_size != self.config.vision.image_size:
            raise ValueError(
                f"image mode 'anyres' cuts tiles of {self.config.vision.image_size} pixels, the "
                f"reduction wants images of {self.crop_size}; choose another"
            )

    def __call__(self, source: ImageSource, name: str | None = None) -> Picture:
        """The crops of an image; errors as in `load_image`."""
        image = load_image(source, name, max_pixels=self.max_pixels)
        layout = self.layout((image.height, image.width))
        if self.mode != "anyres":
            mean = self.config.vision.pixel_mean
            return Picture(preprocess(image, self.crop_size, self.mode, mean)[None], layout)
        return Picture(tiles_of(image, layout, self.crop_size), layout)

    def layout(self, size: Size) -> Layout:
        """The layout of an image of this height and width in pixels."""
        grid = self.crop_size // self.config.vision.patch_size
        if self.mode != "anyres":
            return Layout(grid, newline=self.config.image_newline)
        return anyres_layout(
            size,
            self.config.image_grid_pinpoints,
            self.crop_size,
            grid,
            most_tiles=self.config.anyres_max,
            source=self.config.anyres_source,
        )

    def expected_layout(self, source: ImageSource) -> Layout:
        """The layout by the image's header alone; an image that has none gets one that fits all."""
        if self.mode != "anyres":
            return self.layout((1, 1))
        try:
            return self.layout(image_size(source))
        except ImageError:
            return self.layout((1, 1))


def default_mode(config: LlavaConfig) -> PictureMode:
    """What a model does with images unless told otherwise."""
    return "anyres" if config.image_grid_pinpoints else "pad"


def tiles_of(image: Image.Image, layout: Layout, tile_size: int) -> np.ndarray:
    """The whole image squeezed to S x S, then its tiles, uint8 [C, S, S, 3].

    The image is resized into the resolution with its aspect kept (bicubic on uint8) and put in the
    middle of a black canvas; an odd pixel of the edge goes to the bottom and to the right.
    """
    rows, columns = layout.tiles
    high, wide = rows * tile_size, columns * tile_size
    height, width = resized_inside((image.height, image.width), (high, wide))
    canvas = Image.new("RGB", (wide, high))
    canvas.paste(
        image.resize((width, height), Image.Resampling.BICUBIC),
        ((wide - width) // 2, (high - height) // 2),
    )
    tiles = np.asarray(canvas).reshape(rows, tile_size, columns, tile_size, 3)
    whole = np.asarray(image.resize((tile_size, tile_size), Image.Resampling.BICUBIC))
    return np.concatenate([whole[None], tiles.swapaxes(1, 2).reshape(-1, *whole.shape)])
