"""Frames of videos: a folder of images, an animated GIF, or a video file that PyAV decodes.

A folder and a GIF need nothing else; other files need the extra `video`.
"""

import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image

from prumerge_jax.data.images import MAX_PIXELS, ImageError, Video
from prumerge_jax.messages import quoted, shortened

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")

Sampling = Literal["ends", "starts"]
"""Which of n frames are taken: `ends` has the first and the last among them, as the original code
of LLaVA-OneVision and Video-LLaVA (`linspace(0, n - 1, count)`, rounded down); `starts` the
beginnings of equal parts, as transformers' examples of Video-LLaVA (`arange(0, n, n / count)`)."""


def load_video(
    source: str | os.PathLike[str], *, num_frames: int = 32, sampling: Sampling = "ends"
) -> Video:
    """Frames of a video, evenly spread over it.

    Args:
      source: a folder of images, whose names are in the order of the frames, an animated GIF, or
        a video file.
      num_frames: how many frames to take; see `families.VideoRule`. A shorter video repeats frames.
      sampling: which.

    Raises:
      ImageError: there is no frame, the file cannot be decoded, or PyAV is not installed; the
        message names the file.
      ValueError: `num_frames` is below 1, or no such sampling.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; expected at least 1")
    if sampling not in ("ends", "starts"):
        raise ValueError(f"sampling is {quoted(sampling)}; expected 'ends' or 'starts'")
    path = pathlib.Path(source)
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.suffix.lower() in SUFFIXES)
        if not files:
            raise ImageError(
                f"{shortened(str(path))}: no frames; expected files that end in {SUFFIXES}"
            )
        return Video([files[index] for index in spread(len(files), num_frames, sampling)])
    if not path.is_file():
        raise ImageError(
            f"{shortened(str(path))}: no such file; expected a folder of frames, an animated GIF "
            "or a video file"
        )
    read = _frames_of_animation if _is_gif(path) else _frames_of_file
    return Video(read(path, num_frames, sampling))


def spread(total: int, count: int, sampling: Sampling = "ends") -> list[int]:
    """`count` numbers evenly spread over 0 to total - 1, rounded down; see `Sampling`."""
    if sampling == "ends":
        return np.linspace(0, total - 1, count).astype(int).tolist()
    return (np.arange(count) * (total / count)).astype(int).tolist()


def _is_gif(path: pathlib.Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) == b"GIF8"


def _frames_of_animation(
    path: pathlib.Path, num_frames: int, sampling: Sampling
) -> list[Image.Image]:
    name = shortened(str(path))
    try:
        with Image.open(path, formats=("GIF",)) as animation:
            total = getattr(animation, "n_frames", 1)
            _check_pixels(animation.width, animation.height, name)
            frames: dict[int, Image.Image] = {}
            wanted = spread(total, num_frames, sampling)
            for index in sorted(set(wanted)):
                animation.seek(index)
                frames[index] = animation.convert("RGB")
            return [frames[index] for index in wanted]
    except (OSError, EOFError, SyntaxError) as error:
        raise ImageError(f"{name}: {type(error).__name__}; the animated GIF is damaged") from error


def _frames_of_file(path: pathlib.Path, num_frames: int, sampling: Sampling) -> list[Image.Image]:
    """Decoded twice: what a file says of the number of its frames is not always true."""
    name = shortened(str(path))
    try:
        import av
    except ImportError:
        raise ImageError(
            f"{name}: reading video files needs PyAV: pip install 'prumerge_jax[video]'; or give a "
            "folder of frames or an animated GIF"
        ) from None
    try:
        total = sum(1 for _ in _decoded(av, path, name))
        if not total:
            raise ImageError(f"{name}: no frames; expected at least one")
        wanted = spread(total, num_frames, sampling)
        frames = _chosen(_decoded(av, path, name), wanted)
    except av.FFmpegError as error:
        raise ImageError(
            f"{name}: {type(error).__name__}: {quoted(error.strerror)}; expected a video file"
        ) from error
    return [frames[index] for index in wanted]


def _decoded(av: Any, path: pathlib.Path, name: str) -> Iterator[Any]:
    """The frames of the first video stream of a file."""
    with av.open(os.fspath(path), options={"protocol_whitelist": "file"}) as container:
        if not container.streams.video:
            raise ImageError(f"{name}: no video stream; expected a video file")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        _check_pixels(stream.width, stream.height, name)
        yield from container.decode(stream)


def _chosen(frames: Iterator[Any], wanted: Sequence[int]) -> dict[int, Image.Image]:
    """The frames with these numbers as images; none after the last of them is decoded."""
    last, numbers = max(wanted), set(wanted)
    chosen: dict[int, Image.Image] = {}
    for index, frame in enumerate(frames):
        if index in numbers:
            chosen[index] = frame.to_image().convert("RGB")
        if index == last:
            break
    return chosen


def _check_pixels(width: int, height: int, name: str) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(f"{name}: frames of more than {MAX_PIXELS:,} pixels")
