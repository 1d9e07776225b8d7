"""The command that draws an overlay: what it asks of the model, and what it refuses."""

import dataclasses
import pathlib

import numpy as np
import pytest
from PIL import Image

import prumerge_jax
from prumerge_jax import reductions, visualize
from tests.evaluation.report.test_overlay import grey_image, small_case


@dataclasses.dataclass
class Explanation:
    pixels: np.ndarray
    patch_indices: np.ndarray
    assignment: np.ndarray


@pytest.fixture
def loaded(monkeypatch):
    """Stands in for the model; lists what the command asked of it."""
    calls = []

    class Llava:
        @classmethod
        def load(cls, directory):
            calls.append(directory)
            return cls()

        def explain(self, image, *, reduction):
            calls.append((image.size, reduction))
            return Explanation(*small_case())

    monkeypatch.setattr(prumerge_jax, "Llava", Llava, raising=False)
    return calls


def test_command_writes_the_overlay_of_the_model(tmp_path, loaded):
    Image.fromarray(grey_image(20)).save(tmp_path / "photo.png")
    output = tmp_path / "out.png"
    arguments = ["--checkpoint", "weights", "--image", str(tmp_path / "photo.png")]
    visualize.main([*arguments, "--reduction", "prumerge+:neighbours=8", "--output", str(output)])
    assert loaded == [
        pathlib.Path("weights"),
        ((20, 20), reductions.parse("prumerge+:neighbours=8")),
    ]
    with Image.open(output) as written:
        width, height = written.size
    assert width > 2.5 * height > 1000


MISTAKES = [
    (["--output", "out.jpg"], "--output 'out.jpg' does not end in .png"),
    (["--output", "missing/out.png"], "no such folder"),
    (["--reduction", "prumerg"], "unknown reduction 'prumerg'; did you mean 'prumerge'?"),
    (["--reduction", "prumerge:neighbours=x"], "neighbours is 'x'; expected an integer"),
    (["--reduktion", "full"], "unknown flag '--reduktion'; did you mean '--reduction'?"),
    (["--image", "photo.txt"], r"photo.txt: not a readable image"),
    (["--image", "nowhere.png"], "nowhere.png"),
    (["full"], "unrecognized arguments: full"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_one_line_before_loading(
    tmp_path, loaded, capsys, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(grey_image(20)).save("photo.png")
    pathlib.Path("photo.txt").write_text("no image")
    usual = ["--checkpoint", "weights", "--image", "photo.png", "--output", "out.png"]
    with pytest.raises(SystemExit) as stopped:
        visualize.main([*usual, *arguments])
    line = str(stopped.value.code)
    assert line.startswith("visualize: ")
    assert message in line
    assert "\n" not in line
    assert not capsys.readouterr().err
    assert loaded == []


def test_a_missing_checkpoint_is_one_line(tmp_path):
    Image.fromarray(grey_image(20)).save(tmp_path / "photo.png")
    arguments = [f"--image={tmp_path / 'photo.png'}", f"--output={tmp_path / 'out.png'}"]
    with pytest.raises(SystemExit, match=r"^visualize: .*nowhere"):
        visualize.main([*arguments, f"--checkpoint={tmp_path / 'nowhere'}"])
