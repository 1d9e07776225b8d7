"""Frames of videos from folders and animations."""

import pathlib
import sys

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
    assert spread(20, 8, "starts") == np.arange(0, 20, 20 / 8).astype(int).tolist()


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
    with pytest.raises(ImageError, match=r"film\.gif: .*; the animated GIF is damaged"):
        load_video(tmp_path / "film.gif")
    with pytest.raises(ImageError, match=r"missing\.mp4: no such file; expected a folder of fr"):
        load_video(tmp_path / "missing.mp4")
    with pytest.raises(ValueError, match="num_frames is 0; expected at least 1"):
        load_video(tmp_path, num_frames=0)
    with pytest.raises(ValueError, match="sampling is 'some'; expected 'ends' or 'starts'"):
        load_video(tmp_path, sampling="some")


def test_a_video_file_gives_its_frames(tmp_path: pathlib.Path):
    av = pytest.importorskip("av")
    file = tmp_path / "video.mp4"
    with av.open(str(file), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for level in range(0, 100, 10):
            pixels = np.full((16, 32, 3), 50 + level, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    video = load_video(file, num_frames=4)
    assert [frame.size for frame in video.frames] == [(32, 16)] * 4
    means = [np.asarray(frame).mean() for frame in video.frames]
    np.testing.assert_allclose(means, [50, 80, 110, 140], atol=4)
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ImageError, match=r"text\.mp4: InvalidDataError: .*; expected a video file"):
        load_video(tmp_path / "text.mp4")


def test_video_files_need_the_extra(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "video.mp4").write_bytes(b"\0" * 8)
    with pytest.raises(ImageError, match=r"needs PyAV: pip install 'prumerge_jax\[video\]'; or"):
        load_video(tmp_path / "video.mp4")
