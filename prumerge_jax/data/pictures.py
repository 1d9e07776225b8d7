"""From an image to its crops: one of the tower's size, or the tiles of dynamic resolution.

Shapes: C crops, S side of a crop in pixels.
"""

import dataclasses
import warnings
from collections.abc import Iterable
from typing import Literal, NamedTuple, get_args

import numpy as np
from PIL import Image

from prumerge_jax.data.anyres import Size, resized_inside
from prumerge_jax.data.images import (
    MAX_PIXELS,
    ImageError,
    ImageMode,
    OneOfSeveral,
    Shown,
    Video,
    VideoFile,
    image_size,
    load_image,
    preprocess,
)
from prumerge_jax.data.layout import Layout, anyres_layout
from prumerge_jax.data.loading import Named
from prumerge_jax.data.video import load_video
from prumerge_jax.families import family_of
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
                f"reduction wants smaller images, of {self.crop_size}; expected a reduction that "
                "reduces each tile, as 'uniform', or image_mode 'pad' or 'crop'"
            )

    def __call__(self, shown: Shown | OneOfSeveral, name: str | None = None) -> Picture:
        """The crops of an image, or the frames of a video; errors as in `load_image`."""
        source, mode = self._source_and_mode(shown)
        if isinstance(source, Video | VideoFile):
            layout = self._layout_of_video(source, name)
            if isinstance(source, VideoFile):
                source = load_video(source.path, num_frames=layout.frames)
            return Picture(self._frames(source, name), layout)
        image = load_image(source, name, max_pixels=self.max_pixels)
        layout = self._layout((image.height, image.width), mode)
        if mode != "anyres":
            mean = self.config.vision.pixel_mean
            return Picture(preprocess(image, self.crop_size, mode, mean)[None], layout)
        return Picture(tiles_of(image, layout, self.crop_size), layout)

    def layout(self, size: Size) -> Layout:
        """The layout of an image of this height and width in pixels that is alone in its prompt."""
        return self._layout(size, self.mode)

    def _source_and_mode(self, source: Shown | OneOfSeveral) -> tuple[Shown, PictureMode]:
        """LLaVA-OneVision does not cut several images into tiles."""
        if not isinstance(source, OneOfSeveral):
            return source, self.mode
        is_cut = self.mode == "anyres" and self.config.anyres_max is None
        return source.source, "anyres" if is_cut else "pad" if self.mode == "anyres" else self.mode

    def _layout_of_video(self, video: Video | VideoFile, name: str | None) -> Layout:
        name = name or "video"
        rule = family_of(self.config).video
        if rule is None:
            raise ImageError(f"{name}: a video; the model takes images alone")
        if isinstance(video, Video):
            frames = len(video.frames)
        else:
            frames = rule.num_frames if video.num_frames is None else video.num_frames
        if frames < 1:
            raise ImageError(f"{name}: no frames; expected at least one")
        grid = self.crop_size // self.config.vision.patch_size
        return Layout(
            grid,
            newline=self.config.image_newline,
            frames=frames,
            pooled=-(-grid // rule.pooling),
            cls=rule.cls,
        )

    def _frames(self, video: Video, name: str | None) -> np.ndarray:
        """The pixels of the frames, uint8 [F, S, S, 3]."""
        name = name or "video"
        pixels: list[np.ndarray] = []
        sizes = set()
        for index, source in enumerate(video.frames):
            frame = load_image(source, f"frame {index} of {name}", max_pixels=self.max_pixels)
            sizes.add(frame.size)
            if len(sizes) > 1:
                raise ImageError(
                    f"frame {index} of {name} has {frame.width} x {frame.height} pixels; expected "
                    "all frames of a video to have one size"
                )
            pixels.append(self._frame(frame))
        return np.stack(pixels)

    def _frame(self, frame: Image.Image) -> np.ndarray:
        """A frame squeezed to S x S (bicubic on uint8), or its central square, as the model's."""
        rule = family_of(self.config).video
        assert rule is not None  # else there is no layout
        if rule.squeezed:
            squeezed = frame.resize((self.crop_size,) * 2, Image.Resampling.BICUBIC)
            return np.asarray(squeezed)
        return preprocess(frame, self.crop_size, "crop", self.config.vision.pixel_mean)

    def _layout(self, size: Size, mode: PictureMode) -> Layout:
        grid = self.crop_size // self.config.vision.patch_size
        if mode != "anyres":
            return Layout(grid, newline=self.config.image_newline)
        return anyres_layout(
            size,
            self.config.image_grid_pinpoints,
            self.crop_size,
            grid,
            most_tiles=self.config.anyres_max,
            source=self.config.anyres_source,
        )

    def check_number(self, images: int, name: str) -> None:
        """Raises ValueError for more images in a prompt than the model takes; `name` says whose.

        LLaVA-NeXT takes several, but has not been trained on them: a warning says so.
        """
        takes_video = family_of(self.config).video is not None
        if images > 1 and not (self.config.image_grid_pinpoints or takes_video):
            raise ValueError(f"{name} has {images} images; the model takes one image per prompt")
        if images > 1 and not takes_video:
            warnings.warn(
                f"{name} has {images} images; LLaVA-NeXT has been trained on one per prompt",
                stacklevel=2,
            )

    def layouts(self, images: Iterable[Named]) -> tuple[Layout, ...]:
        """The layouts of images by their headers alone; none of one that is one crop as it is.

        An image whose header cannot be read gets any layout.
        """
        images = tuple(images)
        if not self.config.image_newline and not any(
            isinstance(shown, Video | VideoFile | OneOfSeveral) for _, shown in images
        ):
            return ()
        return tuple(self._expected_layout(source) for _, source in images)

    def _expected_layout(self, shown: Shown | OneOfSeveral) -> Layout:
        source, mode = self._source_and_mode(shown)
        if isinstance(source, Video | VideoFile):
            return self._layout_of_video(source, None)
        if mode != "anyres":
            return self._layout((1, 1), mode)
        try:
            return self._layout(image_size(source), mode)
        except ImageError:
            return self._layout((1, 1), mode)


def default_mode(config: LlavaConfig) -> PictureMode:
    """What a model does with images unless told otherwise."""
    return family_of(config).image_mode


def only_crop(picture: Picture, name: str) -> np.ndarray:
    """Pixels uint8 [S, S, 3] of an image of one crop; ValueError for others, which `name` names."""
    if len(picture.crops) > 1:
        raise ValueError(f"{name} has {len(picture.crops)} crops; expected mode 'pad' or 'crop'")
    return picture.crops[0]


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
