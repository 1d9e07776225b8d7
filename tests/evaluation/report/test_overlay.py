"""The overlay, judged by its drawn pixels."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from prumerge_jax.evaluation.report import overlay as drawing

GREY = 200


def grey_image(size=48):
    return np.full((size, size, 3), GREY, np.uint8)


def sample(figure, panel, grid):
    """[N, 3]: the drawn colour of each patch of a panel, clear of its number and frame."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = np.asarray(canvas.buffer_rgba())[..., :3].astype(int)
    row, column = np.divmod(np.arange(grid**2), grid)
    data = np.stack([column + 0.15, row + 0.15], axis=1)
    x, y = figure.axes[panel].transData.transform(data).T.round().astype(int)
    return drawn[drawn.shape[0] - 1 - y, x]


def numbers(figure, panel, grid):
    """The text written into each patch of a panel, None where there is none."""
    written = [None] * grid**2
    for text in figure.axes[panel].texts:
        x, y = text.get_position()
        patch = int(y) * grid + int(x)
        assert written[patch] is None
        written[patch] = text.get_text()
    return written


def small_case():
    """16 patches; 6 and 1 are kept in this order, 3, 7 and 12 merge, the rest do not."""
    patch_indices = np.array([6, 1], np.int32)
    assignment = np.full(16, -1, np.int32)
    assignment[[6, 3, 7]] = 0
    assignment[[1, 12]] = 1
    return grey_image(), patch_indices, assignment


@pytest.fixture
def small():
    return small_case()


def test_kept_patches_are_lit_and_numbered_in_order(small):
    _, patch_indices, _ = small
    figure = drawing.overlay(*small)
    drawn = sample(figure, 1, grid=4)
    dimmed = np.delete(drawn, patch_indices, axis=0)
    np.testing.assert_allclose(drawn[patch_indices], GREY, atol=2)
    np.testing.assert_allclose(dimmed, drawing.DIM * GREY, atol=2)
    written = numbers(figure, 1, grid=4)
    assert {patch: text for patch, text in enumerate(written) if text} == {6: "1", 1: "2"}
    np.testing.assert_allclose(sample(figure, 0, grid=4), GREY, atol=2)


def test_merged_patches_have_the_colour_and_number_of_their_kept_token(small):
    _, _, assignment = small
    figure = drawing.overlay(*small)
    drawn = sample(figure, 2, grid=4)
    first, second, none = (drawn[assignment == slot] for slot in (0, 1, -1))
    for group in (first, second, none):
        np.testing.assert_allclose(group, np.broadcast_to(group[0], group.shape), atol=2)
    assert np.ptp(none[0]) <= 2, "patches that merge nowhere are grey"
    for group in (first, second):
        assert np.ptp(group[0]) > 60, "a merged patch is coloured"
    assert np.abs(first[0] - second[0]).max() > 60
    expected = [None if slot < 0 else str(slot + 1) for slot in assignment]
    assert numbers(figure, 2, grid=4) == expected


@pytest.mark.parametrize("count", [5, 144])
def test_every_kept_token_of_576_patches_keeps_its_own_colour(count):
    rng = np.random.default_rng(count)
    pixels = grey_image(336)
    patch_indices = rng.permutation(576)[:count].astype(np.int32)
    assignment = rng.integers(-1, count, 576).astype(np.int32)
    assignment[patch_indices] = np.arange(count)
    figure = drawing.overlay(pixels, patch_indices, assignment)
    drawn = sample(figure, 2, grid=24)[patch_indices]
    assert len({tuple(colour) for colour in drawn}) == count
    consecutive = np.abs(np.diff(drawn, axis=0)).max(axis=1)
    assert consecutive.min() > 40, "neighbours in the order are told apart"
    written = numbers(figure, 1, grid=24)
    assert [written[patch] for patch in patch_indices] == [str(n + 1) for n in range(count)]


def test_numbers_fit_into_their_patches():
    count = 144
    assignment = np.full(576, -1, np.int32)
    patch_indices = np.arange(count, dtype=np.int32)
    assignment[patch_indices] = patch_indices
    figure = drawing.overlay(grey_image(336), patch_indices, assignment)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    patch_width = figure.axes[1].get_window_extent().width / 24
    for text in figure.axes[1].texts:
        extent = text.get_window_extent(canvas.get_renderer())
        assert extent.width < patch_width
        assert extent.height > 10, "too small to read"


def test_a_patch_kept_twice_shows_its_first_number(small):
    pixels, _, assignment = small
    figure = drawing.overlay(pixels, np.array([6, 1, 6]), assignment)
    assert numbers(figure, 1, grid=4)[6] == "1"


def test_contradicting_arrays_are_refused(small):
    pixels, patch_indices, assignment = small
    with pytest.raises(ValueError, match=r"expected uint8 \[S, S, 3\]"):
        drawing.overlay(pixels.astype(np.float32), patch_indices, assignment)
    with pytest.raises(ValueError, match="N the square of a number that divides"):
        drawing.overlay(pixels, patch_indices, assignment[:15])
    with pytest.raises(ValueError, match="from 0 to 15, no padding"):
        drawing.overlay(pixels, np.array([6, 1, -1]), assignment)
    with pytest.raises(ValueError, match="between -1 and 1"):
        drawing.overlay(pixels, patch_indices, np.where(assignment < 0, 2, assignment))
    with pytest.raises(ValueError, match="kept patch 1 is assigned to another token"):
        drawing.overlay(pixels, patch_indices, np.zeros(16, np.int32))
