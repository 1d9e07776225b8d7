"""Dynamic resolution: resolutions, tiles, windows, counts and pixels."""

import dataclasses
import hashlib
import json
import pathlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies
from PIL import Image

from prumerge_jax.data.anyres import covered_window, resized_inside, select_resolution
from prumerge_jax.data.images import image_size, load_image, normalize
from prumerge_jax.data.layout import Layout, anyres_layout
from prumerge_jax.data.pictures import PictureProcessor, default_mode
from prumerge_jax.models.config import CLIP_MEAN, CLIP_STD, LlavaConfig, VisionConfig

NEXT = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
ONEVISION = tuple((384 * rows, 384 * columns) for rows in range(1, 7) for columns in range(1, 7))
SIZES = {
    "next": (NEXT, 336, 24, None, "hf"),
    "next_original": (tuple((w, h) for h, w in NEXT), 336, 24, None, "original"),
    "onevision": (ONEVISION, 384, 27, 9, "hf"),
    "onevision_original": (ONEVISION, 384, 27, 9, "original"),
}


def layout_of(size: tuple[int, int], family: str) -> Layout:
    pinpoints, side, grid, most, source = SIZES[family]
    return anyres_layout(size, pinpoints, side, grid, most_tiles=most, source=source)


@pytest.mark.parametrize("family", SIZES)
def test_resolution_and_number_of_tokens_are_the_references(golden: pathlib.Path, family: str):
    wrong = []
    for case in json.loads((golden / "models" / "sizes.json").read_text()):
        layout = layout_of((case["height"], case["width"]), family)
        side = SIZES[family][1]
        found = [layout.tiles[0] * side, layout.tiles[1] * side], layout.span
        if found != (case[f"{family}_hw"], case[f"{family}_tokens"]):
            wrong.append((case, found))
    assert not wrong


CONFIGS = {
    "next": LlavaConfig(family="llava_next", image_grid_pinpoints=NEXT, image_newline=True),
    "onevision": LlavaConfig(
        family="llava_onevision",
        vision=VisionConfig(image_size=384, pixel_mean=(0.5,) * 3, pixel_std=(0.5,) * 3),
        image_grid_pinpoints=ONEVISION,
        image_newline=True,
        anyres_max=9,
    ),
}


def golden_image(golden: pathlib.Path, case: str) -> pathlib.Path:
    """One of the golden images by the name of its case."""
    name = case.rsplit("/", 1)[-1]
    drawn = golden / "models" / "images" / f"{name}.png"
    return drawn if drawn.is_file() else golden / "images" / f"{name}.jpg"


@pytest.mark.parametrize("family", CONFIGS)
def test_pixels_are_the_references(golden: pathlib.Path, family: str):
    config = CONFIGS[family]
    processor = PictureProcessor(config, config.vision.image_size, default_mode(config))
    cases = json.loads((golden / "models" / "full_size_pixels.json").read_text())
    assert len(cases) == 8
    for case in cases:
        picture = processor(golden_image(golden, case["case"]))
        assert len(picture.crops) == picture.layout.num_crops == case[f"{family}_crops"]
        found = hashlib.sha256(picture.crops.tobytes()).hexdigest()
        assert found == case[f"{family}_sha256_uint8_hwc"], case["case"]
        vision = config.vision
        pixels = normalize(picture.crops, vision.pixel_mean, vision.pixel_std)
        chw = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        found = hashlib.sha256(chw.tobytes()).hexdigest()
        assert found == case[f"{family}_sha256_float32_chw"], case["case"]


@hypothesis.given(
    width=strategies.integers(1, 4000),
    height=strategies.integers(1, 3000),
    family=strategies.sampled_from(sorted(SIZES)),
)
@hypothesis.example(width=1600, height=1, family="next")
@hypothesis.example(width=1, height=1600, family="onevision")
@hypothesis.example(width=4000, height=3000, family="onevision")
def test_the_window_is_the_resized_image(width: int, height: int, family: str):
    layout = layout_of((height, width), family)
    grid, (rows, columns) = layout.grid, layout.tiles
    on_image = layout.on_image()
    assert on_image.shape == (layout.num_crops, layout.num_patches)
    assert on_image[0].all()
    assert on_image[1:].sum() == layout.window.rows * layout.window.columns
    side = SIZES[family][1]
    high, wide = resized_inside((height, width), (rows * side, columns * side))
    assert high == rows * side or wide == columns * side
    # Cut in patches, the resized image is the window, but for rounding to whole patches.
    assert abs(layout.window.rows - high * grid / side) <= 2
    assert abs(layout.window.columns - wide * grid / side) <= 2
    assert layout.span == layout.num_patches + layout.shape[0] * (layout.shape[1] + 1)
    if SIZES[family][3] is not None:
        assert layout.shape[0] * layout.shape[1] <= 1.1**2 * 9 * layout.num_patches
    assert layout_of((height, width), family) == layout


def test_an_image_that_no_resolution_shows_gets_the_first_of_least_area():
    assert select_resolution((1, 1600), NEXT) == (336, 672)
    assert layout_of((1, 1600), "next").tiles == (1, 2)


def test_a_line_leaves_no_row_of_its_tiles():
    window = covered_window((8, 400), 24, 48)
    assert (window.rows, window.columns) == (0, 48)
    layout = layout_of((8, 400), "next")
    assert layout.span == 576
    assert not layout.on_image()[1:].any()


def test_rounding_differs_between_transformers_and_the_original():
    assert layout_of((47, 423), "onevision").span == 1114
    assert layout_of((47, 423), "onevision_original").span == 1004


def test_patches_on_the_image_are_in_the_order_of_the_tiles():
    # Two tiles of 2 x 2 patches beside each other; the image covers the two middle columns.
    layout = Layout(2, (1, 2), covered_window((10, 10), 2, 4), (2, 2), newline=True)
    expected = [[True] * 4, [False, True, False, True], [True, False, True, False]]
    np.testing.assert_array_equal(layout.on_image(), expected)


def test_the_header_tells_the_layout(tmp_path: pathlib.Path):
    processor = PictureProcessor(CONFIGS["next"], 336, "anyres")
    image = Image.new("RGB", (640, 480))
    image.save(tmp_path / "image.png")
    sources = [image, tmp_path / "image.png", (tmp_path / "image.png").read_bytes()]
    sources.append(np.asarray(image))
    for source in sources:
        assert image_size(source) == (480, 640)
        assert processor.layouts([("image", source)]) == (processor.layout((480, 640)),)
    assert processor.layout((480, 640)).span == 2340
    assert processor.layouts([("image", b"<html>")]) == (processor.layout((1, 1)),)
    assert PictureProcessor(LlavaConfig(), 336, "pad").layouts([("image", image)]) == ()


def test_pad_mode_on_any_model_is_one_crop():
    image = Image.new("RGB", (640, 480), (255, 0, 0))
    picture = PictureProcessor(CONFIGS["next"], 336, "pad")(image)
    assert picture.crops.shape == (1, 336, 336, 3)
    assert picture.layout.span == 577
    plain = PictureProcessor(LlavaConfig(), 336, "pad")(image)
    np.testing.assert_array_equal(picture.crops, plain.crops)
    assert plain.layout == Layout(24)
    assert plain.layout.span == 576


@pytest.mark.parametrize(
    ("config", "size", "mode", "message"),
    [
        (LlavaConfig(), 336, "anyres", "'anyres' is for models with image_grid_pinpoints"),
        (LlavaConfig(), 336, "tile", "unknown image mode 'tile'; expected one of"),
        (CONFIGS["next"], 168, "anyres", "cuts tiles of 336 pixels, the reduction wants"),
    ],
)
def test_modes_that_a_model_does_not_support(config, size, mode, message):
    with pytest.raises(ValueError, match=message):
        PictureProcessor(config, size, mode)


def test_tiles_repeat_the_pixels_of_a_tower_sized_image():
    """An image of exactly the resolution is cut, not resampled."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (672, 672, 3), np.uint8)
    picture = PictureProcessor(CONFIGS["next"], 336, "anyres")(pixels)
    np.testing.assert_array_equal(picture.crops[2], pixels[:336, 336:])
    np.testing.assert_array_equal(picture.crops[3], pixels[336:, :336])
    base = load_image(pixels).resize((336, 336), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(picture.crops[0], np.asarray(base))
    normalized = normalize(picture.crops, CLIP_MEAN, CLIP_STD)
    assert normalized.shape == (5, 336, 336, 3)
    assert dataclasses.replace(picture.layout, newline=False).span == 576 + 48 * 48
