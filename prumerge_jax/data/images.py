"""Image files to pixels: strict decoding and CLIP's preprocessing, both by PIL.

PIL is the image resizer of record: the torchvision path of newer processors differs by one grey
level here and there, enough to change which tokens PruMerge keeps. Images are kept uint8 up to
`normalize`, so they travel and are stored at a quarter of the size.
"""

import contextlib
import dataclasses
import io
import os
import stat
import warnings
from collections.abc import Iterator, Sequence
from typing import BinaryIO, Literal, get_args

import numpy as np
from PIL import Image, ImageFile

from prumerge_jax.messages import quoted, shortened
from prumerge_jax.models.config import CLIP_MEAN, CLIP_STD

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_PIXELS = 64_000_000
# Pad mode builds a square of the longer side, crop mode a strip of size * aspect ratio: at these
# limits either is one gigabyte for a moment.
MAX_SIDE = 16_384
MAX_ASPECT_RATIO = 2_000

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Video:
    """A video as its frames, in order; each is an image by itself."""

    frames: Sequence[ImageSource]


@dataclasses.dataclass(frozen=True)
class VideoFile:
    """A video that is decoded when its frames are wanted: a file, or a folder of frames.

    Attributes:
      path: see `video.load_video`.
      num_frames: how many of its frames are taken; None for as many as the model was trained with.
    """

    path: str | os.PathLike[str]
    num_frames: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class OneOfSeveral:
    """An image that is not the only one of its prompt; some models cut it otherwise."""

    source: "Shown"


Shown = ImageSource | Video | VideoFile
"""What a prompt may be about."""


ImageMode = Literal["pad", "crop"]
"""`pad`: the image in the middle of a square of the mean colour. `crop`: its central square."""


class ImageError(ValueError):
    """An image cannot be used; the message names it, the cause and what was expected."""


def load_image(
    source: ImageSource, name: str | None = None, *, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Decodes an image completely, or refuses it.

    The result is what `Image.open(source).convert("RGB")` gives: alpha is dropped, not blended; a
    palette or CMYK is converted; of an animation the first frame counts; the EXIF orientation is
    *not* applied, as in LLaVA. One mode differs. PIL clips 16-bit grey at 255, which turns nearly
    all of it white; here the high byte counts, as PIL itself does for 16-bit RGB.

    Sizes are checked on the header, before any pixel is decoded.

    Args:
      source: a file's path or its bytes, a PIL image, or uint8 pixels [H, W, 3].
      name: what to call the image in an error; by default the path.
      max_pixels: most pixels that are decoded.

    Returns:
      A new PIL image of mode RGB, without metadata.

    Raises:
      ImageError: the image is missing, damaged, cut short, not an image, of another format, too
        large or too narrow.
    """
    with _refusing(source, name, max_pixels):
        return _decode(source, max_pixels)


def image_size(
    source: ImageSource, name: str | None = None, *, max_pixels: int = MAX_PIXELS
) -> tuple[int, int]:
    """Height and width of an image in pixels by its header; no pixel is decoded.

    Arguments and errors as in `load_image`.
    """
    with _refusing(source, name, max_pixels):
        if isinstance(source, np.ndarray):
            height, width = source.shape[:2]
            return height, width
        if isinstance(source, Image.Image):
            return source.height, source.width
        if isinstance(source, bytes):
            image = _open(io.BytesIO(source))
            return image.height, image.width
        with open(os.fspath(source), "rb", opener=_open_without_waiting) as file:
            _check_regular(file)
            image = _open(file)
            return image.height, image.width


@contextlib.contextmanager
def _refusing(source: ImageSource, name: str | None, max_pixels: int) -> Iterator[None]:
    """Turns whatever decoders raise into an `ImageError` that names the image."""
    if name is None:
        name = os.fspath(source) if isinstance(source, str | os.PathLike) else "image"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Palettes with alpha: dropping alpha is what `load_image` promises.
            warnings.filterwarnings("ignore", "Palette images with Transparency")
            yield
    except Exception as error:  # decoders raise nearly anything on damaged bytes
        cause = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        if isinstance(error, OSError) and error.strerror:  # without the path, which is the name
            cause = f"{type(error).__name__}: {error.strerror}"
        expected = _expected(max_pixels)
        raise ImageError(f"{shortened(name)}: {cause}; expected {expected}") from error


def _expected(max_pixels: int) -> str:
    return (
        f"a complete {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image of at most "
        f"{max_pixels:,} pixels, {MAX_SIDE:,} on a side and {MAX_ASPECT_RATIO:,} : 1"
    )


def _decode(source: ImageSource, max_pixels: int) -> Image.Image:
    if isinstance(source, Image.Image):
        _check_size(source, max_pixels)
        return _to_rgb(source)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[-1] != 3:
            raise ValueError(
                f"an array of {source.dtype} {list(source.shape)}; arrays must be uint8 [H, W, 3]"
            )
        image = Image.fromarray(source)
        _check_size(image, max_pixels)
        return _to_rgb(image)
    if isinstance(source, bytes):
        return _decode_file(io.BytesIO(source), max_pixels)
    with open(os.fspath(source), "rb", opener=_open_without_waiting) as file:
        _check_regular(file)
        return _decode_file(file, max_pixels)


def _open_without_waiting(path: str, flags: int) -> int:
    """Opens a file; a named pipe too, without waiting for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _check_regular(file: BinaryIO) -> None:
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        raise ValueError("not a regular file")  # reading a pipe or a device may never end


def _open(file: BinaryIO) -> Image.Image:
    """An image of which only the header has been read."""
    head = file.read(256)
    if not head:
        raise ValueError("the file is empty (0 bytes)")
    if head.lstrip().startswith(b"<"):
        raise ValueError("the file is HTML or XML text, perhaps the error page of a download")
    file.seek(0)
    try:
        # The formats go by the content, not by the file's name.
        return Image.open(file, formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise ValueError("not a readable image of a known format") from error


def _decode_file(file: BinaryIO, max_pixels: int) -> Image.Image:
    image = _open(file)
    _check_size(image, max_pixels)
    if image.format == "PNG":
        # Decoding skips the checksums of the pixel data; verify() reads them, and spends the image.
        image.verify()
        file.seek(0)
        image = Image.open(file, formats=("PNG",))
    return _to_rgb(image)


def _check_size(image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if min(width, height) < 1:
        raise ValueError(f"{width} x {height} pixels")
    if width * height > max_pixels or max(width, height) > MAX_SIDE:
        raise ValueError(f"{width} x {height} pixels are too many")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"{width} x {height} pixels are too narrow")


def _to_rgb(image: Image.Image) -> Image.Image:
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise ValueError(
            "some library set PIL.ImageFile.LOAD_TRUNCATED_IMAGES, with which a file that is cut "
            "short decodes to grey without an error; set it to False"
        )
    image.load()
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no defined white; convert it to 8 bits beforehand")
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    rgb = image.convert("RGB")
    rgb.info = {}
    return rgb


def preprocess(
    image: Image.Image,
    size: int = 336,
    mode: ImageMode = "pad",
    mean: Sequence[float] = CLIP_MEAN,
) -> np.ndarray:
    """CLIP's pixels up to the normalisation, bit for bit those of its PIL image processor.

    The shorter side is resized to `size` (antialiased bicubic on uint8; the longer one is rounded
    down), then the central square is cut out. In mode `pad` the image is first put in the middle
    of a square of the mean colour, so that nothing is cut off (LLaVA's `expand2square`).

    Args:
      image: an image of mode RGB, as `load_image` returns it.
      size: side of the result in pixels.
      mode: what happens to an image that is not square.
      mean: mean of each of the three channels, 0 to 1; the colour of the padding.

    Returns:
      uint8 [size, size, 3].

    Raises:
      ValueError: the image is not RGB, or no such mode.
    """
    if image.mode != "RGB":
        raise ValueError(f"an image of mode {image.mode}; expected RGB, as load_image returns it")
    _check_mode(mode)
    if mode == "pad":
        image = _pad_to_square(image, mean)
    width, height = image.size
    longer = int(size * max(width, height) / min(width, height))
    resized = (size, longer) if width <= height else (longer, size)
    left, top = (resized[0] - size) // 2, (resized[1] - size) // 2
    image = image.resize(resized, Image.Resampling.BICUBIC)
    return np.array(image.crop((left, top, left + size, top + size)))


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """From any image to the pixels that a vision tower takes; inference and training share it.

    Attributes:
      image_size: S, side of the pixels.
      pixel_mean: the tower's mean of each channel, 0 to 1; the colour of the padding.
      mode: what happens to an image that is not square.
      max_pixels: most pixels of an image that is decoded.

    Raises:
      ValueError: no such mode.
    """

    image_size: int
    pixel_mean: tuple[float, float, float]
    mode: ImageMode = "pad"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        _check_mode(self.mode)

    def __call__(self, source: ImageSource, name: str | None = None) -> np.ndarray:
        """uint8 [S, S, 3] of an image; errors as in `load_image` and `preprocess`."""
        image = load_image(source, name, max_pixels=self.max_pixels)
        return preprocess(image, self.image_size, self.mode, self.pixel_mean)


def _check_mode(mode: str) -> None:
    if mode not in get_args(ImageMode):
        raise ValueError(
            f"unknown image mode {quoted(mode)}; expected one of {get_args(ImageMode)}"
        )


def _pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    red, green, blue = (int(255 * channel) for channel in mean)
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


def normalize(
    pixels: np.ndarray, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> np.ndarray:
    """Pixels as the vision tower takes them: scaled to 0..1, less the mean, over the deviation.

    Args:
      pixels: uint8 [..., 3].
      mean: mean of each of the three channels, 0 to 1.
      std: standard deviation of each of the three channels, 0 to 1.

    Returns:
      float32 [..., 3], bit for bit CLIP's.

    Raises:
      ValueError: `pixels` is not uint8 with three channels last.
    """
    if pixels.dtype != np.uint8 or pixels.shape[-1:] != (3,):
        raise ValueError(f"pixels of {pixels.dtype} {list(pixels.shape)}; expected uint8 [..., 3]")
    # The product is taken in float64, the rest in float32, as in the reference.
    scaled = (pixels * (1 / 255)).astype(np.float32)
    return (scaled - np.array(mean, np.float32)) / np.array(std, np.float32)
