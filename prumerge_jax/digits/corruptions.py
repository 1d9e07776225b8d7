"""Images made worse, to see whether a reduction breaks before the model does.

Every function takes and returns an RGB image as uint8 [H, W, 3], and draws from a generator.
"""

import hashlib
import io
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageFilter

Corruption = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def noise(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of a standard deviation of a tenth of the range."""
    return _to_uint8(image + rng.normal(0, 25.5, image.shape))


def blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A Gaussian of a standard deviation of a hundredth of the longer side."""
    radius = max(image.shape[:2]) / 100
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))


def clutter(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Twenty short strokes of random grey at random places."""
    cluttered = image.copy()
    height, width, _ = image.shape
    length, thickness = max(height, width) // 12, max(height, width) // 96 + 1
    for _ in range(20):
        top, left = rng.integers(0, height), rng.integers(0, width)
        tall, wide = (length, thickness) if rng.random() < 0.5 else (thickness, length)
        cluttered[top : top + tall, left : left + wide] = rng.integers(0, 256)
    return cluttered


def contrast(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Three tenths of the contrast around the mean."""
    mean = image.mean(axis=(0, 1), keepdims=True)
    return _to_uint8(mean + 0.3 * (image - mean))


CORRUPTIONS: Mapping[str, Corruption] = {
    "noise": noise,
    "blur": blur,
    "clutter": clutter,
    "contrast": contrast,
}
"""By name."""


def corrupt_folder(source: pathlib.Path, target: pathlib.Path, name: str) -> None:
    """Corrupts every PNG file of a folder; a file's draws depend on its name alone.

    Args:
      source: folder of images.
      target: made if it does not exist; files that are there already are left.
      name: one of `CORRUPTIONS`.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.glob("*.png")):
        if (target / path.name).exists():
            continue
        seed = int.from_bytes(hashlib.sha256(f"{name} {path.name}".encode()).digest()[:8])
        with Image.open(path) as opened:
            image = np.asarray(opened.convert("RGB"))
        encoded = io.BytesIO()
        worse = CORRUPTIONS[name](image, np.random.default_rng(seed))
        Image.fromarray(worse).save(encoded, "PNG")
        (target / path.name).write_bytes(encoded.getvalue())


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
