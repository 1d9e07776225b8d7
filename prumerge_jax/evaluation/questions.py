"""The questions of one benchmark, read and checked before anything expensive starts."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from prumerge_jax.evaluation.answers import Answers
from prumerge_jax.evaluation.benchmarks.base import Benchmark

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".gif")
"""Endings that are tried for a video, in this order; without any it is a folder of frames."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A benchmark's files.

    Attributes:
      benchmark: the benchmark.
      questions: its question file.
      images: folder that the questions' image paths are relative to; None if they have none.
      annotations: what the scorer compares with; None where a server or a judge knows.
    """

    benchmark: Benchmark[Any]
    questions: pathlib.Path
    images: pathlib.Path | None
    annotations: pathlib.Path | None


class TaskQuestions:
    """A task's questions and annotations, which fit each other.

    Attributes:
      task: the files.
      questions: in the order of the file; at least one.
      annotations: None where there are none.
      upload_problem: why there will be no upload file; None if there will, or none is due.
      notes: what a reader of the scores must know, one sentence each.
    """

    def __init__(self, task: Task) -> None:
        """Reads questions and annotations, and checks them against each other.

        Raises:
          ValueError: a file is malformed, or the two do not fit; the message names file and row.
          OSError: a file cannot be read.
        """
        self.task = task
        benchmark = task.benchmark
        self.questions = benchmark.read_questions(task.questions)
        if not self.questions:
            raise ValueError(f"{task.questions} has no questions")
        self.annotations = None
        if task.annotations is not None:
            self.annotations = benchmark.read_annotations(task.annotations)
        elif benchmark.needs_annotations:
            raise ValueError(
                f"{benchmark.name} cannot be scored without annotations; pass "
                "--config.annotations=PATH"
            )
        benchmark.check(self.questions, self.annotations, str(task.questions))
        self.upload_problem = benchmark.upload_problem(self.questions, self.annotations)
        note = benchmark.coverage_note(self.questions, self.annotations)
        self.notes = [] if note is None else [f"{benchmark.name}: {note}"]
        if self.upload_problem is not None:
            self.notes.append(f"{benchmark.name}: no upload file: {self.upload_problem}")

    def check_images(self) -> None:
        """Raises FileNotFoundError if the questions' images cannot be there; for a model's run."""
        names = [question.image for question in self.questions if isinstance(question.image, str)]
        folder = self.task.images
        if not names:
            return
        if folder is None or not folder.is_dir():
            raise FileNotFoundError(
                f"image folder {folder} does not exist; pass --config.images=DIR"
            )
        if not any(_exists(folder, name) for name in dict.fromkeys(names)) and not any(
            self.task.benchmark.shows_videos and video_file(folder / name).exists()
            for name in dict.fromkeys(names)
        ):
            raise FileNotFoundError(
                f"none of the images of {self.task.questions} is in {folder}, such as "
                f"{names[0]!r:.80}; pass the folder that they are relative to: --config.images=DIR"
            )

    def refusal(self, index: int) -> str | None:
        """Why the image of a row may not be opened: it is outside of the image folder."""
        image, folder = self.questions[index].image, self.task.images
        if not isinstance(image, str) or folder is None:
            return None
        try:
            file = folder / image
            if self.task.benchmark.shows_videos:
                file = video_file(file)
            inside = file.resolve().is_relative_to(folder.resolve())
        except (OSError, ValueError, RuntimeError) as error:  # NUL, too long, a circle of links
            return f"image {image!r:.80} is not a usable path: {error!s:.80}"
        if inside:
            return None
        return (
            f"image {image!r:.80} is outside of {folder}, directly or by a link, and is not read; "
            "put it there, or pass a folder above both as --config.images"
        )

    def score(self, answers: Answers) -> dict[str, float]:
        """All metrics of a complete answers file."""
        return self.task.benchmark.score(self.questions, answers, self.annotations)

    def per_question(self, answers: Answers) -> Mapping[str, np.ndarray]:
        """Values per question by metric, see `Benchmark.per_question`."""
        return self.task.benchmark.per_question(self.questions, answers, self.annotations)

    def upload(self, answers: Answers, folder: pathlib.Path) -> None:
        """Writes the benchmark's upload files, if there are to be any.

        Raises:
          OSError: a file could not be written.
        """
        if self.upload_problem is None:
            self.task.benchmark.upload(self.questions, answers, self.annotations, folder)


def video_file(path: pathlib.Path) -> pathlib.Path:
    """The file of a video whose ending is not known; the path itself where there is none."""
    for suffix in VIDEO_SUFFIXES:
        file = path.with_name(path.name + suffix)
        if file.is_file():
            return file
    return path


def _exists(folder: pathlib.Path, name: str) -> bool:
    try:
        return (folder / name).exists()
    except (OSError, ValueError):
        return False
