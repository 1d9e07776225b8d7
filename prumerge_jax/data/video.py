"""Frames of videos: a folder of images, or an animated GIF."""

import os
import pathlib

import numpy as np
from PIL import Image

from prumerge_jax.data.images import MAX_PIXELS, ImageError, Video
from prumerge_jax.messages import shortened

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def load_video(source: str | os.PathLike[str], *, num_frames: int = 32) -> Video:
    """Frames of a video, evenly spread over it.

    Args:
      source: a folder of images, whose names are in the order of the frames, or an animated GIF.
      num_frames: how many frames to take, the first and the last among them, as LLaVA-OneVision
        does (`linspace`, rounded down). A shorter video repeats frames.

    Raises:
      ImageError: there is no frame, or the file is no animation; the message names it.
      ValueError: `num_frames` is below 1.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames is {num_frames}; expected at least 1")
    path = pathlib.Path(source)
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.suffix.lower() in SUFFIXES)
        if not files:
            raise ImageError(
                f"{shortened(str(path))}: no frames; expected files that end in {SUFFIXES}"
            )
        return Video([files[index] for index in spread(len(files), num_frames)])
    return Video(_frames_of_animation(path, num_frames))


def spread(total: int, count: int) -> list[int]:
    """`count` numbers evenly spread from 0 to total - 1, rounded down."""
    return np.linspace(0, total - 1, count).astype(int).tolist()


def _frames_of_animation(path: pathlib.Path, num_frames: int) -> list[Image.Image]:
    name = shortened(str(path))
    try:
        with Image.open(path, formats=("GIF",)) as animation:
            total = getattr(animation, "n_frames", 1)
            if animation.width * animation.height > MAX_PIXELS:
                raise ImageError(f"{name}: frames of more than {MAX_PIXELS:,} pixels")
            frames: dict[int, Image.Image] = {}
            wanted = spread(total, num_frames)
            for index in sorted(set(wanted)):
                animation.seek(index)
                frames[index] = animation.convert("RGB")
            return [frames[index] for index in wanted]
    except (OSError, EOFError, SyntaxError) as error:
        raise ImageError(
            f"{name}: {type(error).__name__}; expected a folder of frames or an animated GIF"
        ) from error
