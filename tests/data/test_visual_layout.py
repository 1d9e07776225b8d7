"""Runs of images: the pool's slots and positions that take the place of a placeholder."""

import numpy as np
import pytest

from prumerge_jax.data.visual_layout import CropTokens, runs


def test_an_image_of_one_crop_keeps_the_order_of_its_slots():
    patch_indices = np.array([[5, 2, -1, -1], [0, 1, 2, 8], [-1] * 4], np.int32)
    crops = CropTokens(np.array([3, 4, 0], np.int32), patch_indices, 9)
    assert crops.num_slots == 12
    last, first, empty = runs(crops, [1, 0, 2])
    assert first.index.tolist() == [0, 1, 2]
    assert first.offset.tolist() == [5, 2, 8]  # the extra token stands where the last patch does
    assert last.index.tolist() == [4, 5, 6, 7]
    assert last.offset.tolist() == [0, 1, 2, 8]
    assert len(empty) == 0
    assert {run.span for run in (first, last, empty)} == {9}
    assert first.index.dtype == first.offset.dtype == np.int32


def test_rows_and_lengths_that_do_not_exist_are_refused():
    patch_indices = np.full((2, 4), -1, np.int32)
    crops = CropTokens(np.array([4, 4]), patch_indices, 16)
    for row in (2, -1):
        with pytest.raises(ValueError, match=f"image row {row}; the encoded batch has 2"):
            runs(crops, [row])
    with pytest.raises(ValueError, match="image row 1 has 5 visual tokens; expected 0 to 4"):
        CropTokens(np.array([4, 5]), patch_indices, 16)
    with pytest.raises(ValueError, match="do not fit"):
        CropTokens(np.array([4]), patch_indices, 16)
