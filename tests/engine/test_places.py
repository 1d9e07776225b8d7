"""Where crops go: one shard for all of a request's, windows that close in time."""

import numpy as np
import pytest

from prumerge_jax.data.anyres import Window
from prumerge_jax.data.layout import Layout
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.engine.places import WindowPlaces
from prumerge_jax.engine.request import ImageInput, Request
from prumerge_jax.engine.shapes import EngineShapes

SHAPES = EngineShapes(
    batch_size=4, window_size=8, row_length=8, longest_prompt=8, prefill_rows=2, slots=2,
    cache_length=8,
)  # fmt: skip


def request(key: int, crops: int, *more: int, name: str | None = None) -> Request:
    """A request with an image of so many crops, and further ones."""
    images = []
    for index, count in enumerate((crops, *more)):
        layout = Layout(1, (1, count - 1), Window(0, 1, 0, count - 1), (1, count - 1))
        pixels = np.full((count, 2, 2, 3), 10 * key + index, np.uint8)
        images.append(ImageInput(pixels, layout if count > 1 else Layout(1), name))
    return Request(key, np.array([1] + [IMAGE_TOKEN] * len(images), np.int32), tuple(images))


def test_single_crops_fill_batches_in_order():
    places = WindowPlaces(SHAPES, 1, grid=1)
    for key in range(8):
        assert places.add(request(key, 1))
    assert not places.add(request(8, 1))
    assert places.numbers == [((key,),) for key in range(8)]
    assert [places.crops[number].pixels[0, 0, 0] for number in range(8)] == list(range(0, 80, 10))


def test_a_window_has_no_more_requests_than_its_size_even_without_images():
    places = WindowPlaces(SHAPES, 1, grid=1)
    for key in range(8):
        assert places.add(Request(key, np.array([1], np.int32)))
    assert not places.add(Request(8, np.array([1], np.int32)))
    assert places.crops == {}


def test_a_window_closes_before_crops_that_do_not_fit():
    places = WindowPlaces(SHAPES, 1, grid=1)
    assert places.add(request(0, 5))
    assert not places.add(request(1, 4))
    assert places.add(request(2, 3))
    assert places.numbers == [((0, 1, 2, 3, 4),), ((5, 6, 7),)]
    assert places.num_images == 2


def test_all_crops_of_a_request_are_on_one_shard():
    places = WindowPlaces(SHAPES, 2, grid=1)
    assert places.add(request(0, 3))
    assert places.add(request(1, 2, 1))
    assert not places.add(request(2, 2))  # one place is left on either shard
    assert places.add(request(3, 1))
    # Of each batch of four the first two rows are the first shard's.
    assert places.numbers == [((0, 1, 4),), ((2, 3), (6,)), ((5,),)]
    assert {number: int(crop.pixels[0, 0, 0]) for number, crop in places.crops.items()} == {
        0: 0, 1: 0, 4: 0, 2: 10, 3: 10, 6: 11, 5: 30,
    }  # fmt: skip


def test_requests_with_the_same_image_share_its_crops():
    places = WindowPlaces(SHAPES, 2, grid=1)
    for key in range(3):
        assert places.add(request(key, 3, name="same"))
    assert places.add(request(3, 3))
    assert places.numbers[:3] == [((0, 1, 4),)] * 3
    assert places.num_images == 2
    twice = request(4, 1, 1, name="other")
    assert places.add(twice)
    assert places.numbers[-1] == ((5,), (5,))


@pytest.mark.parametrize(("shards", "needed"), [(1, 9), (2, 18)])
def test_a_request_with_too_many_crops_says_what_to_set(shards: int, needed: int):
    places = WindowPlaces(SHAPES, shards, grid=1)
    assert not places.add(request(0, 9))
    places.refuse(request(0, 9))
    assert f"set --config.engine.window_size to at least {needed}" in places.refused[0]
