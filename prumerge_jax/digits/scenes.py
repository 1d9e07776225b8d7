"""Scenes of real handwritten digits: the images of the miniature benchmark `digits_vqa`.

A scene is a 96 x 96 image with one to six digits in the cells of a 3 x 3 grid, over stroke
clutter and noise. The handwriting is scikit-learn's bundled `load_digits` (1,797 samples of 8 x 8
pixels), split by sample, so that no split shows handwriting of another one. Scene `index` of a
split is a pure function of (seed, split, index); nothing is downloaded.
"""

import dataclasses
import functools
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

GRID = 3
CELL = 32  # pixels
CANVAS = GRID * CELL
MAX_DIGITS = 6
SPLITS = ("train", "validation", "test")
# One word each, so that a small vocabulary spells each of them as one token.
PLACES = (
    "northwest", "north", "northeast",
    "west", "centre", "east",
    "southwest", "south", "southeast",
)  # fmt: skip

_REPEAT_PROBABILITY = 0.7
_DIGIT_SIZES = (20, 29)  # pixels, upper end excluded
# Grey value to grey value: enlarging greys thin strokes, and this brings them back to full ink.
_INK_CURVE = [min(255, int(1.4 * value)) for value in range(256)]
_NOISE_LEVELS = np.array([-12, 0, 0, 12], np.int16)  # few levels keep the PNG files small


@dataclasses.dataclass(frozen=True)
class Scene:
    """One image and what is in it.

    Attributes:
      id: `{split}_{index}`, the index with six figures.
      image: uint8 [96, 96, 3].
      places: the occupied cells by name, in reading order.
      digits: the digit in each of `places`.
      samples: the row of `load_digits` drawn in each of `places`.
      ink: uint8 [96, 96], 1 + the index in `places` of the digit that is drawn there with at least
        half of full ink, 0 elsewhere.
    """

    id: str
    image: NDArray[np.uint8]
    places: tuple[str, ...]
    digits: tuple[int, ...]
    samples: tuple[int, ...]
    ink: NDArray[np.uint8]

    def png(self) -> bytes:
        """The image as an encoded PNG file."""
        buffer = io.BytesIO()
        Image.fromarray(self.image).save(buffer, format="PNG", compress_level=3)
        return buffer.getvalue()


@functools.cache
def handwriting(split: str) -> tuple[tuple[int, ...], ...]:
    """The rows of `load_digits` that belong to a split, for each digit 0 to 9.

    Six of every nine samples of a digit are for training, one for validation and two for test.
    The split does not depend on any seed: a model is never tested on handwriting it was trained on.

    Raises:
      ValueError: the split is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; expected one of {SPLITS}")
    residues = {"train": range(6), "validation": range(6, 7), "test": range(7, 9)}[split]
    _, labels = _load_handwriting()
    rows_of_digit = [np.flatnonzero(labels == digit) for digit in range(10)]
    return tuple(
        tuple(int(row) for position, row in enumerate(rows) if position % 9 in residues)
        for rows in rows_of_digit
    )


def scene_random(seed: int, split: str, index: int, purpose: int) -> np.random.RandomState:
    """An independent random stream for one purpose of one scene.

    NumPy freezes the stream of `RandomState` for good, unlike that of its newer generators, so
    the data set remains the same over NumPy versions.
    """
    return np.random.RandomState([seed, SPLITS.index(split), index, purpose])


def draw_scene(split: str, index: int, *, seed: int, scenes_per_layout: int = 1) -> Scene:
    """Draws one scene.

    Args:
      split: one of `SPLITS`; decides which handwriting is used.
      index: number of the scene in its split.
      seed: seed of the data set.
      scenes_per_layout: this many scenes in a row have the same occupied places and differ in
        their digits, which is what contrastive pre-training on digits (not places) needs.

    Raises:
      ValueError: the split is unknown.
    """
    rows_of_digit = handwriting(split)
    layout_random = scene_random(seed, split, index // scenes_per_layout, purpose=0)
    count = layout_random.randint(1, MAX_DIGITS + 1)
    cells = np.sort(layout_random.permutation(len(PLACES))[:count])
    random = scene_random(seed, split, index, purpose=1)
    digits = _draw_digits(count, random)
    samples = [rows_of_digit[digit][random.randint(len(rows_of_digit[digit]))] for digit in digits]
    image, ink = _render(cells, samples, random)
    return Scene(
        id=f"{split}_{index:06d}",
        image=image,
        places=tuple(PLACES[cell] for cell in cells),
        digits=tuple(int(digit) for digit in digits),
        samples=tuple(samples),
        ink=ink,
    )


@functools.cache
def _load_handwriting() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Ink [1797, 8, 8] as grey values 0 to 255, and the digit of each sample [1797]."""
    # Not at the top: it takes a second to import, and whoever only scores answers draws no scene.
    from sklearn.datasets import load_digits

    data = load_digits()
    ink = (data.images * (255 / data.images.max())).astype(np.uint8)
    return ink, data.target


def _draw_digits(count: int, random: np.random.RandomState) -> NDArray[np.int64]:
    """Digits [count], all different, or one of them two or three times and at least one other.

    Repeats are much more frequent than chance would make them: without them, nearly every answer
    to "how many of the digits are 3" would be 0 or 1.
    """
    digits = random.permutation(10)[:count]
    if count > 2 and random.rand() < _REPEAT_PROBABILITY:
        times = random.randint(2, min(count - 1, 3) + 1)
        digits[:times] = digits[0]
    return random.permutation(digits)


def _render(
    cells: NDArray[np.int64], samples: list[int], random: np.random.RandomState
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The image, uint8 [96, 96, 3]: bright digits over dim strokes on a dark, noisy background; and
    `Scene.ink`."""
    ground = random.uniform(10, 60, 3)
    slope = random.uniform(-20, 20, (2, 1, 1, 1))
    ramp = np.linspace(-1, 1, CANVAS)
    pixels = ground + slope[0] * ramp[:, None, None] + slope[1] * ramp[None, :, None]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    _draw_clutter(image, ground, random)
    handwritten, _ = _load_handwriting()
    ink = np.zeros((CANVAS, CANVAS), np.uint8)
    for number, (cell, sample) in enumerate(zip(cells, samples, strict=True), start=1):
        size = random.randint(*_DIGIT_SIZES)
        row, column = divmod(int(cell), GRID)
        top, left = random.randint(0, CELL - size + 1, 2) + (row * CELL, column * CELL)
        mask = Image.fromarray(handwritten[sample]).resize((size, size), Image.Resampling.BICUBIC)
        mask = mask.point(_INK_CURVE)
        ink[top : top + size, left : left + size][np.asarray(mask) >= 128] = number
        colour = tuple(random.randint(170, 256, 3).tolist())
        image.paste(colour, (int(left), int(top)), mask)
    noise = _NOISE_LEVELS[random.randint(0, len(_NOISE_LEVELS), (CANVAS, CANVAS, 1))]
    return (np.asarray(image) + noise).clip(0, 255).astype(np.uint8), ink


def _draw_clutter(
    image: Image.Image, ground: NDArray[np.float64], random: np.random.RandomState
) -> None:
    """Draws thin bent strokes, dimmer than any digit, anywhere in the image."""
    draw = ImageDraw.Draw(image)
    for _ in range(random.randint(4, 9)):
        colour = tuple(int(value) for value in ground + random.uniform(30, 75))
        start = random.uniform(0, CANVAS, 2)
        points = start + np.cumsum(random.uniform(-14, 14, (3, 2)), axis=0)
        draw.line([(x, y) for x, y in points], fill=colour, width=int(random.randint(1, 3)))
