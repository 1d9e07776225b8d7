"""Runs of images: the pool's slots and positions that take the place of a placeholder."""

import jax
import numpy as np
import pytest

from prumerge_jax.data.anyres import Window
from prumerge_jax.data.layout import Layout
from prumerge_jax.data.visual_layout import (
    CropTokens,
    run_of_image,
    run_of_whole_image,
    runs,
    share_out,
)
from prumerge_jax.models.config import NEWLINE

# The whole image and 1 x 2 tiles of 2 x 2 patches, of which the two middle columns are image.
TWO_TILES = Layout(2, (1, 2), Window(0, 2, 1, 3), (2, 2), newline=True)


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


def test_a_whole_image_is_its_base_and_the_rows_of_its_mosaic():
    crops = CropTokens(np.full(5, 4), np.tile(np.arange(4), (5, 1)), 4)
    assert crops.are_whole([4, 0, 2])
    run = run_of_whole_image(crops, TWO_TILES, [4, 0, 2])
    # Right column of the left tile beside the left column of the right one.
    expected = [16, 17, 18, 19, 1, 8, NEWLINE, 3, 10, NEWLINE]
    assert run.index.tolist() == expected
    assert run.offset.tolist() == list(range(10))
    assert run.span == TWO_TILES.span == 10
    assert run.taps is None
    one_crop = run_of_whole_image(crops, Layout(2, newline=True), [3])
    assert one_crop.index.tolist() == [12, 13, 14, 15, NEWLINE]
    plain = run_of_whole_image(crops, Layout(2), [3])
    (expected_run,) = runs(crops, [3])
    for field in ("index", "offset", "span"):
        np.testing.assert_array_equal(getattr(plain, field), getattr(expected_run, field))


def test_pruned_crops_follow_each_other_and_keep_their_positions():
    patches = np.array([[3, 0, -1, -1], [3, 1, -1, -1], [2, -1, -1, -1]], np.int32)
    crops = CropTokens(np.array([3, 3, 1]), patches, 4)
    run = run_of_image(crops, TWO_TILES, [0, 1, 2])
    assert run.index.tolist() == [0, 1, 2, 4, 5, 6, 8]
    # Extra tokens stand at the last patch of their crop: 3 of the base, row 1 column 0 of a tile.
    assert run.offset.tolist() == [3, 0, 3, 7, 4, 7, 8]
    assert run.span == 10
    by_row = run_of_image(crops, TWO_TILES, [0, 1, 2], "row")
    assert by_row.index.tolist() == [0, 1, 2, 5, NEWLINE, 4, 8, NEWLINE, 6]
    assert by_row.offset.tolist() == [3, 0, 3, 4, 6, 7, 8, 9, 7]
    at_end = run_of_image(crops, TWO_TILES, [0, 1, 2], "end")
    assert at_end.index.tolist() == [*run.index, NEWLINE]
    assert at_end.offset[-1] == 9


def test_crops_without_a_token_leave_nothing():
    crops = CropTokens(np.zeros(3, np.int32), np.full((3, 4), -1, np.int32), 4)
    for newlines in ("none", "row"):
        assert len(run_of_image(crops, TWO_TILES, [0, 1, 2], newlines)) == 0
    line = Layout(2, (1, 2), Window(1, 1, 0, 4), (0, 4), newline=True)
    whole = CropTokens(np.full(3, 4), np.tile(np.arange(4), (3, 1)), 4)
    assert run_of_whole_image(whole, line, [0, 1, 2]).index.tolist() == [0, 1, 2, 3]
    assert not line.on_image()[1:].any()


def test_a_shrunk_mosaic_is_interpolated_as_resize_does():
    layout = Layout(3, (2, 3), Window(0, 6, 1, 8), (4, 5), newline=True)
    crops = CropTokens(np.full(7, 9), np.tile(np.arange(9), (7, 1)), 9)
    rows = [3, 0, 6, 2, 5, 1, 4]
    run = run_of_whole_image(crops, layout, rows)
    assert len(run) == layout.span == 9 + 4 * 6
    pool = np.random.default_rng(0).normal(size=(7 * 9, 2)).astype(np.float32)
    got = (
        pool[run.taps.slots] * run.taps.weight[..., None] * (run.taps.slots >= 0)[..., None]
    ).sum(1)
    slots = np.array(rows)[:, None] * 9 + np.arange(9)
    mosaic = pool[layout.window_of(slots[1:])]
    expected = jax.image.resize(mosaic, (4, 5, 2), "linear", antialias=False)
    np.testing.assert_array_equal(got[:9], pool[slots[0]])
    np.testing.assert_allclose(got[9:].reshape(4, 6, 2)[:, :5], expected, atol=1e-5)
    assert (run.index[9:].reshape(4, 6)[:, 5] == NEWLINE).all()
    # Rows of the mosaic map to the shrunk row that their middle lies in.
    assert layout.positions()[1, [0, 3, 6]].tolist() == [9, 15, 15]


def test_a_budget_is_shared_out_in_proportion():
    assert share_out(np.array([10, 5, 5]), 20).tolist() == [10, 5, 5]
    assert share_out(np.array([10, 5, 5]), 10).tolist() == [5, 3, 2]  # of equals the first
    assert share_out(np.array([3, 0, 1]), 2).tolist() == [2, 0, 0]
    counts = np.random.default_rng(0).integers(0, 40, (50, 7))
    for row in counts:
        shares = share_out(row, 30)
        assert shares.sum() == min(30, row.sum())
        assert (shares <= row).all()


def test_a_budget_leaves_each_crop_its_first_patches_and_the_extra_token():
    patches = np.array([[3, 0, 1, -1], [3, -1, -1, -1], [2, 0, -1, -1]], np.int32)
    crops = CropTokens(np.array([4, 2, 3]), patches, 4)
    run = run_of_image(crops, TWO_TILES, [0, 1, 2], budget=3)
    assert run.index.tolist() == [0, 1, 3, 5, 8, 10]
    whole = run_of_image(crops, TWO_TILES, [0, 1, 2])
    assert run_of_image(crops, TWO_TILES, [0, 1, 2], budget=6).index.tolist() == list(whole.index)


@pytest.mark.parametrize(
    ("tiles", "window", "rows", "columns"),
    [
        ((2, 2), Window(0, 8, 0, 8), [0, 0, 1, 1], [0, 0, 1, 1]),
        ((2, 2), Window(3, 5, 0, 8), [0, 0, 1, 1], [0, 0, 1, 1]),
        ((1, 3), Window(0, 4, 0, 12), [0, 0, 0, 0], [0, 1, 1, 2]),
        ((1, 3), Window(1, 3, 4, 8), [0, 0, 0, 0], [1, 1, 1, 1]),  # within the middle tile
        ((3, 1), Window(2, 10, 0, 4), [0, 1, 1, 2], [0, 0, 0, 0]),
        ((1, 3), Window(2, 2, 0, 12), [0, 0, 0, 0], [0, 1, 1, 2]),  # not even a row of patches
    ],
)
def test_a_patch_of_the_whole_image_lies_in_a_tile(
    tiles: tuple[int, int], window: Window, rows: list[int], columns: list[int]
) -> None:
    tile = Layout(4, tiles, window).tile_of_patch().reshape(4, 4)
    np.testing.assert_array_equal(tile, 1 + np.add.outer(np.array(rows) * tiles[1], columns))
