"""Images made worse."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from prumerge_jax.digits.corruptions import CORRUPTIONS, corrupt_folder


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_changes_an_image_and_keeps_its_shape(name: str) -> None:
    image = np.random.default_rng(0).integers(0, 256, (96, 72, 3), np.uint8)
    before = image.copy()
    worse = CORRUPTIONS[name](image, np.random.default_rng(1))
    again = CORRUPTIONS[name](image, np.random.default_rng(1))
    np.testing.assert_array_equal(image, before)
    np.testing.assert_array_equal(worse, again)
    assert (worse.shape, worse.dtype) == (image.shape, np.uint8)
    assert (worse != image).mean() > 0.02
    if name == "contrast":
        assert worse.std() < 0.4 * image.std()


def test_a_file_is_corrupted_the_same_in_any_company(tmp_path: pathlib.Path) -> None:
    for folder, names in (("one", ["a"]), ("both", ["b", "a"])):
        (tmp_path / folder).mkdir()
        for name in names:
            pixels = np.full((32, 32, 3), 7 if name == "a" else 200, np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{name}.png")
        corrupt_folder(tmp_path / folder, tmp_path / f"{folder}_noise", "noise")
    one, both = (
        (tmp_path / f"{folder}_noise" / "a.png").read_bytes() for folder in ("one", "both")
    )
    assert one == both
