"""Worker processes give the same pixels, in order, and name what they cannot decode."""

import contextlib
import dataclasses
import os
import pathlib
import time

import numpy as np
import pytest
from PIL import Image

from prumerge_jax.data import loading
from prumerge_jax.data.images import CLIP_MEAN, ImageError, ImageProcessor, ImageSource
from prumerge_jax.data.loading import Named, ReaderPool, stream_pixels


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
        stream_pixels(iter(images), ImageProcessor(8, CLIP_MEAN), num_workers=num_workers, ahead=3)
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


@dataclasses.dataclass(frozen=True)
class TrapProcessor(ImageProcessor):
    """Hangs on images named `hang`, as on a dead network drive, and dies on those named `die`."""

    def __call__(self, source: ImageSource, name: str | None = None) -> np.ndarray:
        if name == "hang":
            time.sleep(3600)
        if name == "die":
            os._exit(1)
        return super().__call__(source, name)


def test_only_regular_files_are_opened(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    good = tmp_path / "good.png"
    Image.new("RGB", (5, 5)).save(good)
    paths = [tmp_path / "pipe.png", tmp_path / "folder.png", pathlib.Path("/dev/zero"), good]
    named = [(str(path), path) for path in paths]
    started = time.monotonic()
    pixels = list(stream_pixels(named, ImageProcessor(8, CLIP_MEAN), num_workers=0))
    assert time.monotonic() - started < 10
    for path, error in zip(paths[:3], pixels[:3], strict=True):
        assert isinstance(error, ImageError)
        assert path.name in str(error)
    assert "not a regular file" in str(pixels[0])
    assert isinstance(pixels[3], np.ndarray)


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_reader_that_hangs_costs_its_image_alone(
    num_workers: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "TIMEOUT_SECONDS", 10)
    path = tmp_path / "image.png"
    Image.new("RGB", (5, 5), (9, 9, 9)).save(path)
    names = ["a", "hang", "b", *(["die"] if num_workers else []), "c", "d", "e"]
    named = [(name, path) for name in names]
    processor = TrapProcessor(8, CLIP_MEAN)
    pixels = dict(zip(names, stream_pixels(named, processor, num_workers=num_workers), strict=True))
    assert str(pixels.pop("hang")) == "hang: not decoded within 10 seconds"
    if num_workers:
        assert str(pixels.pop("die")) == "die: the process that decoded it ended"
    for each in pixels.values():
        assert isinstance(each, np.ndarray)
        assert (each == 9).all()


@pytest.mark.slow
def test_an_end_does_not_wait_for_a_reader_that_hangs(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (5, 5)).save(path)
    processor = TrapProcessor(8, CLIP_MEAN)
    stream = stream_pixels([("a", path), ("hang", path)], processor, num_workers=2)
    assert isinstance(next(stream), np.ndarray)
    started = time.monotonic()
    stream.close()
    assert time.monotonic() - started < 20


@pytest.mark.slow
def test_readers_have_a_limit_of_memory() -> None:
    processor = ImageProcessor(8, CLIP_MEAN)
    with contextlib.closing(ReaderPool(1, 60, memory_bytes=400 << 20)) as pool:
        wide = Image.new("RGB", (16_000, 10))  # its square is 768 MB
        error = pool.submit(("wide", wide), processor).result()
        assert str(error) == "wide: decoding it takes more memory than is allowed"
        small = Image.new("RGB", (16, 10))
        pixels = pool.submit(("small", small), processor).result()
        assert isinstance(pixels, np.ndarray)
        assert pixels.shape == (8, 8, 3)
