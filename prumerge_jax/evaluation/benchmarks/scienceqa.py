"""ScienceQA: multiple choice, half of it with an image (llava/eval/eval_science_qa.py)."""

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from prumerge_jax.evaluation import jsonfiles
from prumerge_jax.evaluation.answers import Answers
from prumerge_jax.evaluation.benchmarks.base import (
    LETTER_INSTRUCTION,
    Benchmark,
    Question,
    count_as_wrong,
)

_LETTERS = "ABCDE"
_IMAGE = "<image>"
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


class Key(NamedTuple):
    """The truth about one question: index of the right choice, and how many choices there are."""

    answer: int
    n_choices: int


Annotations = Mapping[str, Key]
"""By question id, in the order of the split."""


def parse_letter(text: str) -> str | None:
    """The letter an answer chooses, or None if it cannot be told (the reference says FAILED)."""
    if len(text) == 1 and text in _LETTERS:
        return text
    if text[:1] in _LETTERS and text[1:3] == ". ":
        return text[0]
    sentences: list[str] = _SENTENCE.findall(text)
    return sentences[0] if len(sentences) == 1 else None


def choice_index(text: str, n_choices: int) -> int:
    """Index of the chosen option, or -1 for no letter or one beyond the choices."""
    letter = parse_letter(text)
    return _LETTERS[:n_choices].find(letter) if letter is not None else -1


class ScienceQa(Benchmark[Annotations]):
    """4241 questions, 2017 of them with an image; papers report `accuracy_image`.

    Annotations: the folder of the data set's pid_splits.json and problems.json. All questions of
    the test split count: one without an answer is wrong, as for the reference, and counted in
    `unanswered`.
    """

    name = "scienceqa"
    headline = "accuracy_image"
    max_new_tokens = 1024
    crops_in_llava_1_5 = True

    def read_questions(self, path: pathlib.Path) -> list[Question]:
        """Reads llava_test_CQM-A.json: `{id, image?, conversations: [{value}, ...]}` objects."""
        questions = []
        for number, row in enumerate(jsonfiles.read_list(path), start=1):
            where = f"{path} entry {number}"
            turns = jsonfiles.field(row, "conversations", list, where)
            if not turns:
                raise ValueError(f"{where} has no conversation turn")
            asked = jsonfiles.string(turns[0], "value", where).replace(_IMAGE, "").strip()
            questions.append(
                Question(
                    question_id=jsonfiles.string(row, "id", where),
                    image=jsonfiles.string(row, "image", where) if "image" in row else None,
                    text=f"{asked}\n{LETTER_INSTRUCTION}",
                )
            )
        self.check_distinct(questions, path)
        return questions

    def answer_row(self, question: Question, text: str) -> jsonfiles.Row:
        """The prompt names the image: the scorer tells image questions by it."""
        prompt = question.text if question.image is None else f"{_IMAGE}\n{question.text}"
        return {"question_id": question.question_id, "prompt": prompt, "text": text}

    def read_annotations(self, path: pathlib.Path) -> Annotations:
        """Reads the test split of a folder of the official data set."""
        problems = jsonfiles.read_object(path / "problems.json")
        splits = path / "pid_splits.json"
        keys = {}
        for question_id in jsonfiles.strings(jsonfiles.read_object(splits), "test", str(splits)):
            where = f"{path / 'problems.json'} entry {question_id!r}"
            problem = jsonfiles.field(problems, question_id, dict, where)
            n_choices = len(jsonfiles.field(problem, "choices", list, where))
            keys[question_id] = Key(jsonfiles.field(problem, "answer", int, where), n_choices)
        if not keys:
            raise ValueError(f"{splits} names no question of the split 'test'")
        return keys

    def per_question(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> dict[str, np.ndarray]:
        """Right or wrong: `accuracy` over the split, `accuracy_image` where the prompt has one."""
        keys = self.required(annotations)
        rows = self._known_answers(answers, keys)
        right = np.array(
            [
                question_id in rows
                and choice_index(rows[question_id]["text"], key.n_choices) == key.answer
                for question_id, key in keys.items()
            ],
            np.float64,
        )
        has_image = np.array(
            [question_id in rows and _IMAGE in rows[question_id]["prompt"] for question_id in keys]
        )
        values = {"accuracy": right}
        if has_image.any():
            values["accuracy_image"] = right[has_image]
        return values

    def score(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> dict[str, float]:
        """The accuracies, and the numbers of questions not answered and not parsed."""
        keys = self.required(annotations)
        rows = self._known_answers(answers, keys)
        unparsed = sum(parse_letter(row["text"]) is None for row in rows.values())
        return super().score(questions, answers, annotations) | {
            "unanswered": float(len(keys) - len(rows)),
            "unparsed": float(unparsed),
        }

    def coverage_note(
        self, questions: Sequence[Question], annotations: Annotations | None
    ) -> str | None:
        """How many questions of the split are not asked, and that they count as wrong."""
        keys = self.required(annotations)
        return count_as_wrong(len(keys) - len(questions), len(keys))

    def _known_answers(self, answers: Answers, keys: Annotations) -> dict[str, jsonfiles.Row]:
        rows = {str(key): row for key, row in self.answers_by_key(answers).items()}
        for number, row in enumerate(answers.rows, start=1):
            if row["question_id"] not in keys:
                raise ValueError(
                    f"{answers.source} row {number}: question_id {row['question_id']!r:.80} is not "
                    f"in the test split (ids are strings)"
                )
        return rows
