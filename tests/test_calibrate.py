"""`python -m prumerge_jax.reductions.calibrate`."""

import pathlib
import re

import numpy as np
import pytest
from PIL import Image

from prumerge_jax import reductions
from prumerge_jax.cli import calibrate
from tests.tiny_llava import write_tiny_llava


def run(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        calibrate.main(["calibrate.py", *arguments])
    assert not ended.value.code, ended.value.code


def test_a_reduction_and_percentiles_are_printed(tmp_path: pathlib.Path, capsys) -> None:
    model = write_tiny_llava(tmp_path / "tiny")
    rng = np.random.default_rng(0)
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for number in range(5):
        folder = tmp_path / "photos" / ("more" if number % 2 else "")
        pixels = rng.integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    run(
        f"--checkpoint={model}", f"--images={tmp_path / 'photos'}", "--tokens=4",
        "--reduction=cover:adaptive=coverage,min_tokens=2",
    )  # fmt: skip
    first, images, _, tokens = capsys.readouterr().out.splitlines()
    reduction = reductions.parse(first)
    assert (reduction.adaptive, reduction.min_tokens) == ("coverage", 2)
    assert 0 < reduction.threshold < 1
    mean = re.fullmatch(r"5 images, ([\d.]+) tokens per image", images)
    assert mean
    assert 2 <= float(mean[1]) <= 4
    assert len(tokens.split()) == 1 + len(calibrate.PERCENTILES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images=nowhere", "--tokens=4"], "--checkpoint is missing"),
        (["--checkpoint=miniature", "--images=nowhere", "--tokens=4"], "no such folder"),
        (["--checkpoint=miniature", "--images=docs/images", "--tokens=no"], "tokens"),
        (
            ["--checkpoint=miniature", "--images=docs/images", "--tokens=4", "--reduction=top"],
            "expected cover with adaptive=coverage",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message) as error:
        calibrate.main(["calibrate.py", *arguments])
    assert "\n" not in str(error.value)
