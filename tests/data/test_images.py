import dataclasses
import hashlib
import io
import json
import pathlib
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from prumerge_jax.data import images
from prumerge_jax.data.images import (
    CLIP_MEAN,
    ImageError,
    ImageProcessor,
    load_image,
    normalize,
    preprocess,
)
from prumerge_jax.messages import shortened

MODES = ("crop", "pad")


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(image: Image.Image | np.ndarray, file_format: str, **options) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def sha256_chw(pixels: np.ndarray) -> str:
    """SHA-256 of normalised [H, W, 3] pixels, in the channel order of the reference."""
    return hashlib.sha256(np.ascontiguousarray(pixels.transpose(2, 0, 1)).tobytes()).hexdigest()


def synthetic() -> Image.Image:
    return Image.fromarray((np.random.RandomState(0).rand(375, 500, 3) * 255).astype(np.uint8))


# ---- the reference's bits ----


@pytest.mark.parametrize(
    ("mode", "digest"), [("crop", "ce1eca12a5e34979"), ("pad", "5302e529edc0ebcc")]
)
def test_synthetic_image_has_the_bits_of_the_reference(mode, digest):
    pixels = normalize(preprocess(load_image(synthetic()), mode=mode))
    assert pixels.dtype == np.float32
    assert pixels.shape == (336, 336, 3)
    assert sha256_chw(pixels).startswith(digest)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("photo", ["extreme_ironing.jpg", "waterview.jpg"])
def test_photo_has_the_bits_of_the_reference(golden: pathlib.Path, photo, mode):
    expected = json.loads((golden / "images/expected_preprocess.json").read_text())
    expected = expected["images"][photo]
    image = load_image(golden / "images" / photo)
    assert list(image.size) == expected["size_wh"]
    decoded = hashlib.sha256(np.asarray(image).tobytes()).hexdigest()
    assert decoded == expected["decoded_rgb_sha256"], "another JPEG decoder, not another resizer"

    pixels = normalize(preprocess(image, mode=mode))

    assert pixels[168, 168, 0] == np.float32(expected[mode]["pixel_0_168_168"])
    assert sha256_chw(pixels) == expected[mode]["sha256_float32_chw"]


@pytest.mark.torch
@pytest.mark.parametrize("mode", MODES)
def test_the_bits_tell_a_torchvision_resize_apart(mode):
    """torchvision resizes a uint8 tensor with this very call."""
    torch = pytest.importorskip("torch")
    ours = preprocess(synthetic(), mode=mode)
    source = np.array(synthetic())
    size, columns = (336, 448), slice(56, 392)
    if mode == "pad":
        size, columns = (336, 336), slice(0, 336)
        source = np.full((500, 500, 3), (122, 116, 104), np.uint8)
        source[62:437] = np.array(synthetic())
    tensor = torch.from_numpy(source).permute(2, 0, 1)[None]
    theirs = torch.nn.functional.interpolate(tensor, size, mode="bicubic", antialias=True)[0]
    theirs = theirs.permute(1, 2, 0).numpy()[:, columns]
    difference = np.abs(theirs.astype(int) - ours)
    assert 0 < np.count_nonzero(difference) < 0.1 * difference.size
    assert difference.max() == 1
    assert sha256_chw(normalize(theirs)) != sha256_chw(normalize(ours))


def test_every_grey_level_has_bits_of_its_own():
    """So a difference of one level anywhere changes a checksum."""
    levels = normalize(np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1))
    assert np.all(np.diff(levels, axis=0) > 0)


@settings(max_examples=40)
@given(
    width=st.integers(1, 90),
    height=st.integers(1, 90),
    size=st.sampled_from([14, 56, 63]),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_clip_image_processor(width, height, size, mode, seed):
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "CLIPImageProcessorPil"):
        pytest.skip(f"transformers {transformers.__version__} has no CLIPImageProcessorPil")
    array = noise(height, width, seed)
    processor = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    reference_input = array
    if mode == "pad":
        side = max(width, height)
        reference_input = np.full((side, side, 3), (122, 116, 104), np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        reference_input[top : top + height, left : left + width] = array
    expected = processor(Image.fromarray(reference_input), return_tensors="np")["pixel_values"][0]

    actual = normalize(preprocess(load_image(array), size, mode))

    np.testing.assert_array_equal(actual.transpose(2, 0, 1), expected)


def test_mean_and_std_of_another_tower():
    mean, std = (0.0, 0.5, 1.0), (0.5, 0.25, 1.0)
    wide = Image.new("RGB", (40, 10), (255, 255, 255))
    pixels = preprocess(wide, size=20, mode="pad", mean=mean)
    assert pixels.shape == (20, 20, 3)
    np.testing.assert_array_equal(pixels[0, 0], (0, 127, 255))
    np.testing.assert_array_equal(pixels[10, 10], (255, 255, 255))
    np.testing.assert_allclose(normalize(pixels, mean, std)[10, 10], (2, 2, 0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1, 1), (5000, 3), (3, 5000)])
def test_tiny_and_narrow_images(size, mode):
    image = load_image(Image.new("RGB", size, (10, 20, 30)))
    pixels = preprocess(image, size=28, mode=mode)
    assert pixels.shape == (28, 28, 3)
    if mode == "crop" or size == (1, 1):
        assert np.all(pixels == (10, 20, 30))
    else:
        assert np.all(pixels[0, 0] == (122, 116, 104))


def test_preprocess_refuses_other_modes():
    with pytest.raises(ValueError, match="mode L; expected RGB"):
        preprocess(Image.new("L", (4, 4)))
    with pytest.raises(ValueError, match="'stretch'"):
        preprocess(Image.new("RGB", (4, 4)), mode="stretch")
    with pytest.raises(ValueError, match=r"float32 \[4, 4, 3\]; expected uint8"):
        normalize(np.zeros((4, 4, 3), np.float32))
    with pytest.raises(ValueError, match=r"uint8 \[3, 4, 4\]; expected uint8"):
        normalize(np.zeros((3, 4, 4), np.uint8))


# ---- what decodes, and to what ----


def sample_image(mode: str) -> Image.Image:
    image = Image.fromarray(noise(6, 9)).convert("RGBA")
    image.putalpha(Image.fromarray(noise(6, 9, seed=1)[..., 0]))
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [
        ("RGB", "PNG"), ("RGB", "BMP"), ("RGB", "JPEG"), ("RGB", "WEBP"), ("RGBA", "PNG"),
        ("RGBA", "WEBP"), ("L", "PNG"), ("L", "JPEG"), ("LA", "PNG"), ("P", "PNG"), ("P", "GIF"),
        ("CMYK", "JPEG"), ("1", "PNG"),
    ],
)  # fmt: skip
def test_modes_convert_as_in_the_reference(tmp_path, mode, file_format):
    content = encoded(sample_image(mode), file_format)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, of palettes with alpha
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    path = tmp_path / "image"
    path.write_bytes(content)
    for source in (content, path, str(path), Image.open(path)):
        image = load_image(source)
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), expected)


def test_alpha_is_dropped_and_not_blended():
    image = Image.new("RGBA", (2, 2), (200, 100, 50, 0))
    assert load_image(encoded(image, "PNG")).getpixel((0, 0)) == (200, 100, 50)


def test_sixteen_bit_grey_keeps_its_high_byte():
    grey = np.array([[0, 255, 256, 0x1234, 65535]], np.uint16)
    image = load_image(encoded(Image.fromarray(grey), "PNG"))
    np.testing.assert_array_equal(np.asarray(image)[0, :, 0], [0, 0, 1, 0x12, 255])


def test_exif_orientation_is_not_applied_and_metadata_is_dropped():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    content = encoded(noise(8, 16), "JPEG", exif=exif, comment=b"<script>")
    assert Image.open(io.BytesIO(content)).getexif()[0x0112] == 6
    image = load_image(content)
    assert image.size == (16, 8)
    assert image.info == {}
    assert not image.getexif()


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "MPO"])
def test_first_frame_of_several(file_format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    content = encoded(
        frames[0], file_format, save_all=True, append_images=frames[1:], **(
            {"lossless": True} if file_format == "WEBP" else {}
        )
    )  # fmt: skip
    assert Image.open(io.BytesIO(content)).n_frames == 2
    red, green, blue = load_image(content).getpixel((8, 8))
    assert red > 250
    assert green < 5
    assert blue < 5


def test_array_is_taken_as_it_is():
    array = noise(5, 7)
    np.testing.assert_array_equal(np.asarray(load_image(array)), array)


# ---- what is refused ----


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises an image and holds almost none of it."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"x\x9c")


def flipped(content: bytes, at: int) -> bytes:
    at %= len(content)
    return content[:at] + bytes([content[at] ^ 0x40]) + content[at + 1 :]


JPEG, PNG, WEBP, GIF, BMP = (encoded(noise(40, 60), name) for name in images.FORMATS)
BAD_FILES = {
    "empty.jpg": (b"", "0 bytes"),
    "zeros.jpg": (b"\0" * 4096, "not a readable image"),
    "text.png": (b"just some words\n" * 20, "not a readable image"),
    "error_page.jpg": (b"\n<!DOCTYPE html><html>404</html>", "HTML"),
    "drawing.svg": (b'<?xml version="1.0"?><svg width="9" height="9"/>', "XML"),
    "half.jpg": (JPEG[: len(JPEG) // 2], "truncated"),
    "no_end.jpg": (JPEG[:-2], "truncated"),
    "head.jpg": (JPEG[:20], "not a readable image"),
    "half.png": (PNG[: len(PNG) // 2], "Truncated"),
    "flipped.png": (flipped(PNG, PNG.index(b"IDAT") + 60), "broken PNG file"),
    "wrong_crc.png": (flipped(PNG, -13), "broken PNG file"),
    "half.webp": (WEBP[: len(WEBP) // 2], ""),
    "half.gif": (GIF[: len(GIF) // 2], "truncated"),
    "half.bmp": (BMP[: len(BMP) // 2], "truncated"),
    "scan.tiff": (encoded(noise(4, 4), "TIFF"), "not a readable image"),
    "bomb.png": (png_header(30_000, 30_000), "DecompressionBomb"),
    "large.png": (png_header(8_001, 8_001), "8001 x 8001 pixels are too many"),
    "long.png": (png_header(20_000, 1_000), "20000 x 1000 pixels are too many"),
    "thread.png": (png_header(2_001, 1), "2001 x 1 pixels are too narrow"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_by_name(tmp_path, name):
    content, cause = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        load_image(path)
    message = str(caught.value)
    assert message.startswith(f"{shortened(str(path))}: ")
    assert cause in message
    assert "expected a complete JPEG" in message
    with pytest.raises(ImageError, match="^image 17: "):
        load_image(content, name="image 17")


@settings(max_examples=60)
@given(st.integers(8, len(PNG) - 1))
def test_no_flipped_byte_changes_a_png_silently(position):
    try:
        image = load_image(flipped(PNG, position))
    except ImageError:
        return
    np.testing.assert_array_equal(np.asarray(image), noise(40, 60))


@pytest.mark.parametrize("name", ["bomb.png", "large.png", "long.png", "thread.png"])
def test_size_is_refused_before_any_pixel_is_decoded(monkeypatch, name):
    decoded = []
    load = ImageFile.ImageFile.load

    def watched(self):
        decoded.append(self.size)
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", watched)
    with pytest.raises(ImageError):
        load_image(BAD_FILES[name][0])
    assert decoded == []
    load_image(BMP)
    assert decoded, "the check watches the wrong function"


def test_a_lower_limit_of_pixels():
    image = Image.new("RGB", (30, 40))
    processor = ImageProcessor(8, CLIP_MEAN, max_pixels=1199)
    with pytest.raises(ImageError, match="30 x 40 pixels are too many; .* at most 1,199 pixels"):
        processor(image)
    assert dataclasses.replace(processor, max_pixels=1200)(image).shape == (8, 8, 3)


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("nowhere.jpg", "No such file"),
        (".", "directory"),
        (None, "NoneType"),
        (0, "int"),
        (np.zeros((4, 4, 3), np.float32), r"float32 \[4, 4, 3\]"),
        (np.zeros((4, 4), np.uint8), r"uint8 \[4, 4\]"),
        (np.zeros((0, 4, 3), np.uint8), "4 x 0 pixels"),
        (Image.new("F", (4, 4)), "mode F has no defined white"),
        (Image.new("RGB", (1, 2001)), "1 x 2001 pixels are too narrow"),
    ],
    ids=["missing", "folder", "none", "number", "float", "grey", "empty", "mode_f", "narrow"],
)
def test_other_unusable_sources(source, cause):
    with pytest.raises(ImageError, match=cause):
        load_image(source)


def test_a_tolerant_pillow_is_refused(monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(ImageError, match="LOAD_TRUNCATED_IMAGES"):
        load_image(BAD_FILES["half.jpg"][0])
