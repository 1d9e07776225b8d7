"""Worker processes give the same pixels, in order, and name what they cannot decode."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from prumerge_jax.data.images import CLIP_MEAN, ImageError
from prumerge_jax.data.loading import Named, stream_pixels


@pytest.fixture
def images(tmp_path: pathlib.Path) -> list[Named | None]:
    rng = np.random.default_rng(0)
    named: list[Named | None] = []
    for number in range(7):
        path = tmp_path / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, size=(9, 5 + number, 3)).astype(np.uint8)).save(path)
        named += [(path.name, path)] * (1 + number % 3)
    named.insert(4, None)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"not an image")
    named.insert(6, (bad.name, bad))
    return named


@pytest.mark.parametrize("num_workers", [0, 2])
def test_pixels_in_order(images: list[Named | None], num_workers: int) -> None:
    got = list(
        stream_pixels(
            iter(images), size=8, mode="pad", mean=CLIP_MEAN, num_workers=num_workers, ahead=3
        )
    )
    assert len(got) == len(images)
    seen: dict[str, np.ndarray] = {}
    for named, pixels in zip(images, got, strict=True):
        if named is None:
            assert pixels is None
        elif named[0] == "bad.png":
            assert isinstance(pixels, ImageError)
            assert "bad.png" in str(pixels)
        else:
            assert isinstance(pixels, np.ndarray)
            assert pixels.shape == (8, 8, 3)
            np.testing.assert_array_equal(pixels, seen.setdefault(named[0], pixels))
    assert len({pixels.tobytes() for pixels in seen.values()}) == 7
