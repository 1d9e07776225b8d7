"""What all benchmarks have in common: questions, answer lines, scores, files for a server.

A benchmark is a subclass of `Benchmark` in a separate file; `registry.benchmark` finds it by
name. Nothing here runs a model. All rates are in percent.
"""

import abc
import dataclasses
import pathlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np

from prumerge_jax.data.images import ImageMode
from prumerge_jax.data.packing import PositionIds
from prumerge_jax.evaluation import jsonfiles
from prumerge_jax.evaluation.answers import Answers

QuestionId = int | str
Annotations = TypeVar("Annotations")

PROTOCOLS = ("llava-1.5", "llava-1.6")
"""The code of October 2023 that the published LLaVA-1.5 and PruMerge scores come from, and LLaVA's
main branch since v1.2.0."""

LETTER_INSTRUCTION = "Answer with the option's letter from the given choices directly."
"""What the scripts append to ScienceQA's and MMBench's questions (--single-pred-prompt)."""


@dataclasses.dataclass(frozen=True)
class Question:
    """One row of a benchmark.

    Attributes:
      question_id: As in the question file; unique except in MME and TextVQA.
      image: Path relative to the image folder, the encoded image itself (MMBench), or None.
      text: The complete user text, instruction included, without `<image>`.
      extra: What else the benchmark's scorer or answer line needs.
    """

    question_id: QuestionId
    image: str | bytes | None
    text: str
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def is_grade(value: Any, most: float) -> bool:
    """Whether a value of a judge's file is a number from 0 to `most`."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most


def count_as_wrong(missing: int, total: int) -> str | None:
    """The note of a benchmark that counts unanswered questions as wrong; None if all are asked."""
    if missing <= 0:
        return None
    return f"{missing} of the {total} questions are not asked and count as wrong"


class TaskFiles(NamedTuple):
    """The files of one benchmark.

    Attributes:
      questions: The question file.
      images: Folder that the questions' image paths are relative to; None if they have none.
      annotations: What the scorer compares with; None where a server or a judge knows.
    """

    questions: pathlib.Path
    images: pathlib.Path | None
    annotations: pathlib.Path | None


class Benchmark(abc.ABC, Generic[Annotations]):
    """One benchmark: reader, prompt, scorer, upload file.

    Attributes:
      name: Key in the registry.
      headline: Metric that represents the benchmark in summaries.
      max_new_tokens: Limit of LLaVA's script for this benchmark; decoding is greedy.
      position_ids: Positions of the visual tokens where the configuration names none, see
        `packing.pack_window`.
      reductions: Those that run where the configuration names none, separated by spaces.
      scores: Whether answers can be scored at all.
      default_options: Options of `write_default_files` with their defaults, for a benchmark that
        can make its files itself; None for all others.
      group_label: What `group_of` counts, for the report's table of tokens by group; None where
        images are not grouped.
      crops_in_llava_1_5: Whether protocol llava-1.5 crops the images (llava/eval/model_vqa.py and
        model_vqa_science.py of v1.1) instead of padding them.
      shows_videos: Whether a question's image is the name of a video, without its ending.
      needs_annotations: Whether scoring, or writing the upload, fails without annotations. If not,
        `score` returns what it can say without, which is nothing where a server or a judge knows.
    """

    name: str
    headline: str = "accuracy"
    max_new_tokens: int = 128
    position_ids: PositionIds = "compact"
    reductions: str = "full prumerge+ prumerge"
    crops_in_llava_1_5: bool = False
    shows_videos: bool = False
    needs_annotations: bool = True
    scores: bool = True
    default_options: ClassVar[Mapping[str, Any] | None] = None
    group_label: str | None = None

    def image_mode(self, protocol: str) -> ImageMode:
        """How images become square under a named protocol version.

        Raises:
          ValueError: The protocol is not in `PROTOCOLS`.
        """
        if protocol not in PROTOCOLS:
            raise ValueError(f"unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
        return "crop" if protocol == "llava-1.5" and self.crops_in_llava_1_5 else "pad"

    def key(self, question_id: QuestionId, prompt: str) -> Hashable:
        """What joins an answer to its question, from the fields of an answer line."""
        return question_id

    def read_questions(self, path: pathlib.Path) -> list[Question]:
        """Reads the question file, by default LLaVA's `{question_id, image, text, category}` lines.

        Raises:
          ValueError: A row is malformed or repeats another; the message names file and row.
        """
        questions = []
        for number, row in enumerate(jsonfiles.read_jsonl(path), start=1):
            where = f"{path} row {number}"
            category = row.get("category")
            if not isinstance(category, str | int | None):
                raise ValueError(f"{where}: field 'category' must be str, not {category!r:.80}")
            questions.append(
                Question(
                    question_id=jsonfiles.field(row, "question_id", (int, str), where),
                    image=self._image_of(row, where),
                    text=jsonfiles.string(row, "text", where),
                    extra={"category": category},
                )
            )
        self.check_distinct(questions, path)
        return questions

    def _image_of(self, row: jsonfiles.Row, where: str) -> str | None:
        """The image path of a line of the question file."""
        return jsonfiles.string(row, "image", where)

    def check_distinct(self, questions: Sequence[Question], path: pathlib.Path) -> None:
        """Raises ValueError, naming both rows, if two questions have one key."""
        first_row: dict[Hashable, int] = {}
        for number, question in enumerate(questions, start=1):
            try:
                key = self._question_key(question)
            except ValueError as error:
                raise ValueError(f"{path} row {number}: {error}") from error
            if key in first_row:
                raise ValueError(f"{path} row {number} repeats row {first_row[key]}: {key!r:.80}")
            first_row[key] = number

    def answer_row(self, question: Question, text: str) -> jsonfiles.Row:
        """The benchmark's fields of an answer line; see `answers.complete_row`."""
        return {"question_id": question.question_id, "prompt": question.text, "text": text}

    @abc.abstractmethod
    def read_annotations(self, path: pathlib.Path) -> Annotations:
        """Reads what the answers are compared with.

        Raises:
          ValueError: The path is not what this benchmark's class describes.
        """

    @abc.abstractmethod
    def per_question(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> dict[str, np.ndarray]:
        """Values per question, [questions that count] float64, by the metric whose mean they are.

        The order depends on questions and annotations alone, so arrays of two runs are paired.

        Raises:
          ValueError: Answers and questions do not fit each other.
        """

    def score(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> dict[str, float]:
        """All metrics by name, rates in percent; by default the means of `per_question`.

        Raises:
          ValueError: Answers and questions do not fit each other.
        """
        values = self.per_question(questions, answers, annotations)
        return {name: 100 * float(np.mean(value)) for name, value in values.items()}

    def check(
        self,
        questions: Sequence[Question],
        annotations: Annotations | None,
        source: str = "the question file",
    ) -> None:
        """Raises what `score` would raise once all questions are answered, before any is.

        It scores an empty answer to every question: whether questions and annotations fit each
        other does not depend on what the answers say.

        Args:
          questions: As read.
          annotations: As read.
          source: Name of the question file in messages.

        Raises:
          ValueError: Questions and annotations do not fit each other.
        """
        self.score(questions, self._empty_answers(questions, source), annotations)

    def coverage_note(
        self, questions: Sequence[Question], annotations: Annotations | None
    ) -> str | None:
        """What a reader must know of a score over a part of the benchmark; None where nothing."""
        return None

    def upload_files(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> Mapping[str, str | bytes]:
        """Content of what a server, a judge or an official tool takes, by path in the workdir.

        Raises:
          ValueError: Answers, questions and annotations do not fit each other.
          ModuleNotFoundError: A package that only the upload needs is not installed.
        """
        return {}

    def upload_problem(
        self, questions: Sequence[Question], annotations: Annotations | None
    ) -> str | None:
        """Why there will be no upload file although answers can be scored; None if there will."""
        try:
            self.upload_files(questions, self._empty_answers(questions, "answers"), annotations)
        except (ValueError, ModuleNotFoundError) as error:
            return str(error)
        return None

    def upload(
        self,
        questions: Sequence[Question],
        answers: Answers,
        annotations: Annotations | None,
        folder: pathlib.Path,
    ) -> list[pathlib.Path]:
        """Writes `upload_files` below `folder`; returns the files written."""
        paths = []
        for name, content in self.upload_files(questions, answers, annotations).items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            jsonfiles.replace_file(path, content)
            paths.append(path)
        return paths

    def write_default_files(self, folder: pathlib.Path, options: Mapping[str, Any]) -> None:
        """Makes the benchmark's files below `folder`; needs `default_options`.

        Raises:
          ValueError: An option is not allowed. Nothing is written.
        """
        raise NotImplementedError

    def default_files(self, folder: pathlib.Path) -> TaskFiles:
        """Where `write_default_files` puts them."""
        raise NotImplementedError

    def check_default_options(self, options: Mapping[str, Any]) -> None:
        """Raises ValueError for options that `write_default_files` would refuse."""

    def group_of(self, question: Question, annotations: Annotations | None) -> int:
        """The group of the question's image, see `group_label`."""
        raise NotImplementedError

    def required(self, annotations: Annotations | None) -> Annotations:
        """The annotations, or ValueError if none were given."""
        if annotations is None:
            raise ValueError(f"{self.name} needs annotations; {type(self).__name__} says which")
        return annotations

    def answers_by_key(self, answers: Answers) -> dict[Hashable, jsonfiles.Row]:
        """The answer lines by `key`.

        Raises:
          ValueError: Two lines have one key; the message names file and rows.
        """
        by_key: dict[Hashable, jsonfiles.Row] = {}
        first_row: dict[Hashable, int] = {}
        for number, row in enumerate(answers.rows, start=1):
            key = self.key(row["question_id"], row["prompt"])
            if key in by_key:
                raise ValueError(
                    f"{answers.source} row {number} answers {key!r:.80} again, after row "
                    f"{first_row[key]}; keep one of the two"
                )
            by_key[key], first_row[key] = row, number
        return by_key

    def in_question_order(
        self, questions: Sequence[Question], answers: Answers
    ) -> list[jsonfiles.Row]:
        """The answer lines, exactly one per question, in the order of the questions.

        Raises:
          ValueError: An answer is missing, repeated, or to no question.
        """
        by_key = self.answers_by_key(answers)
        keys = [self._question_key(question) for question in questions]
        unknown = by_key.keys() - set(keys)
        if unknown:
            number = next(
                number
                for number, row in enumerate(answers.rows, start=1)
                if self.key(row["question_id"], row["prompt"]) in unknown
            )
            question_id = answers.rows[number - 1]["question_id"]
            raise ValueError(
                f"{answers.source} has {len(unknown)} answers to no question of the {len(keys)}, "
                f"the first in row {number}, question_id {question_id!r:.80}"
            )
        missing = [number for number, key in enumerate(keys, start=1) if key not in by_key]
        if missing:
            raise ValueError(
                f"{answers.source} lacks answers to {len(missing)} of {len(keys)} questions, the "
                f"first to question row {missing[0]}, {keys[missing[0] - 1]!r:.80}; score "
                "these first"
            )
        return [by_key[key] for key in keys]

    def _question_key(self, question: Question) -> Hashable:
        return self.key(question.question_id, self.answer_row(question, "")["prompt"])

    def _empty_answers(self, questions: Sequence[Question], source: str) -> Answers:
        return Answers(source, [self.answer_row(question, "") for question in questions])
