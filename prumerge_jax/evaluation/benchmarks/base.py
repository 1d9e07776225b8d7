"""What all benchmarks have in common: questions, answer lines, scores, files for a server.

A benchmark is a subclass of `Benchmark` in a file of its own; `registry.benchmark` finds it by
name. Nothing here runs a model. All rates are in percent.
"""

import abc
import dataclasses
import pathlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

import numpy as np

from prumerge_jax.evaluation import jsonfiles
from prumerge_jax.evaluation.answers import Answers

QuestionId = int | str
ImageMode = Literal["pad", "crop"]
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
      text: The whole user text, instruction included, without `<image>`.
      extra: What else the benchmark's scorer or answer line needs.
    """

    question_id: QuestionId
    image: str | bytes | None
    text: str
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Benchmark(abc.ABC, Generic[Annotations]):
    """One benchmark: reader, prompt, scorer, upload file.

    Attributes:
      name: Key in the registry.
      headline: Metric that stands for the benchmark in summaries.
      max_new_tokens: Limit of LLaVA's script for this benchmark; decoding is greedy.
      crops_in_llava_1_5: Whether protocol llava-1.5 crops the images (llava/eval/model_vqa.py and
        model_vqa_science.py of v1.1) instead of padding them.
      needs_annotations: Whether scoring, or writing the upload, fails without annotations. If not,
        `score` returns what it can say without, which is nothing where a server or a judge knows.
    """

    name: str
    headline: str = "accuracy"
    max_new_tokens: int = 128
    crops_in_llava_1_5: bool = False
    needs_annotations: bool = True

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
            questions.append(
                Question(
                    question_id=jsonfiles.field(row, "question_id", (int, str), where),
                    image=jsonfiles.string(row, "image", where),
                    text=jsonfiles.string(row, "text", where),
                    extra={"category": row.get("category")},
                )
            )
        self.check_distinct(questions, path)
        return questions

    def check_distinct(self, questions: Sequence[Question], path: pathlib.Path) -> None:
        """Raises ValueError, naming both rows, if two questions have one key."""
        first_row: dict[Hashable, int] = {}
        for number, key in enumerate(self._question_keys(questions), start=1):
            if key in first_row:
                raise ValueError(f"{path} row {number} repeats row {first_row[key]}: {key!r}")
            first_row[key] = number

    def answer_row(self, question: Question, text: str) -> jsonfiles.Row:
        """The benchmark's own fields of an answer line; see `answers.complete_row`."""
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

    def upload(
        self,
        questions: Sequence[Question],
        answers: Answers,
        annotations: Annotations | None,
        folder: pathlib.Path,
    ) -> list[pathlib.Path]:
        """Writes what a server, a judge or an official tool takes; returns the files written."""
        return []

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
                    f"{answers.source} row {number} answers {key!r} again, after row "
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
        keys = self._question_keys(questions)
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
                f"the first in row {number}, question_id {question_id!r}"
            )
        missing = [number for number, key in enumerate(keys, start=1) if key not in by_key]
        if missing:
            raise ValueError(
                f"{answers.source} lacks answers to {len(missing)} of {len(keys)} questions, the "
                f"first to question row {missing[0]}, {keys[missing[0] - 1]!r}; score these first"
            )
        return [by_key[key] for key in keys]

    def _question_keys(self, questions: Sequence[Question]) -> list[Hashable]:
        return [
            self.key(question.question_id, self.answer_row(question, "")["prompt"])
            for question in questions
        ]
