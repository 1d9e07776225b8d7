"""NExT-QA: multiple choice on videos (arXiv 2105.08276; its MC split as lmms-eval asks it)."""

import csv
import io
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from prumerge_jax.evaluation import jsonfiles
from prumerge_jax.evaluation.answers import Answers
from prumerge_jax.evaluation.benchmarks.base import LETTER_INSTRUCTION, Benchmark, Question

_LETTERS = "ABCDE"
_COLUMNS = ("video", "question", "answer", "qid", "type", *(f"a{i}" for i in range(5)))
_KINDS = {"C": "causal", "T": "temporal", "D": "descriptive"}
_FIRST_LETTER = re.compile(r"\(?([A-E])\b")


class NextQa(Benchmark[None]):
    """Five options each; the truth is in the question table.

    Questions: test.csv or val.csv of the MC split, columns `video`, `question`, `a0` to `a4`,
    `answer` (the number of the right option), `qid`, `type` and others. A question is named
    `VIDEO_QID`.
    """

    name = "nextqa"
    shows_videos = True
    max_new_tokens = 16
    needs_annotations = False

    def read_questions(self, path: pathlib.Path) -> list[Question]:
        """Reads the table."""
        text = jsonfiles.read_file(path).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""))
        if lacking := sorted(set(_COLUMNS) - set(reader.fieldnames or ())):
            raise ValueError(f"{path} has no columns {lacking}")
        questions = []
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if None in row.values():
                raise ValueError(f"{where} has another number of cells than the header")
            if row["answer"] not in ("0", "1", "2", "3", "4"):
                raise ValueError(f"{where}: answer is {row['answer']!r:.80}; expected 0 to 4")
            if row["type"][:1] not in _KINDS:
                raise ValueError(
                    f"{where}: type is {row['type']!r:.80}; expected one that begins with "
                    f"{', '.join(_KINDS)}"
                )
            options = [f"{letter}. {row[f'a{i}'].strip()}" for i, letter in enumerate(_LETTERS)]
            lines = [row["question"].strip(), *options, LETTER_INSTRUCTION]
            extra = {"answer": _LETTERS[int(row["answer"])], "kind": _KINDS[row["type"][0]]}
            name = f"{row['video']}_{row['qid']}"
            questions.append(Question(name, row["video"], "\n".join(lines), extra))
        self.check_distinct(questions, path)
        return questions

    def read_annotations(self, path: pathlib.Path) -> None:
        """There are none other than the question table."""
        raise ValueError(f"{self.name} takes its answers from the question table, not from {path}")

    def per_question(
        self, questions: Sequence[Question], answers: Answers, annotations: None
    ) -> dict[str, np.ndarray]:
        """Right or wrong: `accuracy`, and by the kind of question `accuracy_causal`, ..."""
        rows = self.in_question_order(questions, answers)
        right = np.array(
            [
                chosen_letter(row["text"]) == question.extra["answer"]
                for question, row in zip(questions, rows, strict=True)
            ],
            np.float64,
        )
        kinds = np.array([question.extra["kind"] for question in questions])
        by_kind: Mapping[str, np.ndarray] = {
            f"accuracy_{kind}": right[kinds == kind] for kind in dict.fromkeys(kinds.tolist())
        }
        return {"accuracy": right, **by_kind}


def chosen_letter(text: str) -> str | None:
    """The option that an answer begins with, as in "B", "B. a cat" or "(B)"; None for none."""
    match = _FIRST_LETTER.match(text.strip())
    return None if match is None else match[1]
