"""Frames of videos from folders and animations."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from prumerge_jax.data.images import ImageError
from prumerge_jax.data.video import load_video, spread


def frames(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 6), (20 * index, 0, 255 - 20 * index)) for index in range(count)]


def test_frames_are_evenly_spread():
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(3, 5) == [0, 0, 1, 1, 2]
    assert spread(7, 1) == [0]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: pathlib.Path):
    for index, frame in enumerate(frames(11)):
        frame.save(tmp_path / f"{index:02}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    video = load_video(tmp_path, num_frames=3)
    assert [path.name for path in video.frames] == ["00.png", "05.png", "10.png"]


def test_an_animation_gives_its_frames(tmp_path: pathlib.Path):
    first, *others = frames(5)
    first.save(tmp_path / "video.gif", save_all=True, append_images=others, duration=10)
    video = load_video(tmp_path / "video.gif", num_frames=3)
    for frame, expected in zip(video.frames, frames(5)[::2], strict=True):
        np.testing.assert_array_equal(np.asarray(frame), np.asarray(expected))


def test_what_is_no_video_is_said_in_a_line(tmp_path: pathlib.Path):
    with pytest.raises(ImageError, match="no frames; expected files that end in"):
        load_video(tmp_path)
    (tmp_path / "film.gif").write_bytes(b"GIF89a")
    for name in ("film.gif", "missing.gif"):
        with pytest.raises(ImageError, match=r"expected a folder of frames or an animated GIF"):
            load_video(tmp_path / name)
    with pytest.raises(ValueError, match="num_frames is 0; expected at least 1"):
        load_video(tmp_path, num_frames=0)
