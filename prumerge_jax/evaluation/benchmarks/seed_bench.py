"""SEED-Bench: multiple choice on images and middle frames of videos.

arXiv 2307.16125; scripts/convert_seed_for_submission.py.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from prumerge_jax.evaluation import jsonfiles
from prumerge_jax.evaluation.answers import Answers
from prumerge_jax.evaluation.benchmarks.base import (
    Benchmark,
    Question,
    QuestionId,
    count_as_wrong,
)


@dataclasses.dataclass(frozen=True)
class Truth:
    """One question of SEED-Bench.json; `data_type` is image or video."""

    question_id: QuestionId
    answer: str
    data_type: str
    question_type: str

    @property
    def answer_key(self) -> QuestionId:
        """The id as LLaVA's question file has it: an integer wherever it can be one."""
        try:
            return int(self.question_id)
        except ValueError:
            return self.question_id


Annotations = Sequence[Truth]
"""In the order of the file."""


class SeedBench(Benchmark[Annotations]):
    """19,242 questions; an answer is right if it *is* the letter.

    Annotations: SEED-Bench.json. All its questions count: one without an answer is wrong, as for
    the reference, and counted in `unanswered`.
    """

    name = "seed_bench"

    def read_annotations(self, path: pathlib.Path) -> Annotations:
        """Reads the official file."""
        data = jsonfiles.read_object(path)
        names = jsonfiles.field(data, "question_type", dict, str(path))
        type_names = {
            jsonfiles.field(names, name, int, f"{path} question_type"): name for name in names
        }
        truths = []
        for number, row in enumerate(jsonfiles.field(data, "questions", list, str(path)), start=1):
            where = f"{path} question {number}"
            question_type = jsonfiles.field(row, "question_type_id", int, where)
            if question_type not in type_names:
                raise ValueError(f"{where}: question_type_id {question_type} has no name")
            truths.append(
                Truth(
                    jsonfiles.field(row, "question_id", (int, str), where),
                    jsonfiles.string(row, "answer", where),
                    jsonfiles.string(row, "data_type", where),
                    type_names[question_type],
                )
            )
        if not truths:
            raise ValueError(f"{path} has no questions")
        return truths

    def per_question(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> dict[str, np.ndarray]:
        """Right or wrong: `accuracy`, per `accuracy_image` / `_video` and per kind of question.

        Raises:
          ValueError: An answer is to no question of the annotations.
        """
        truths = self.required(annotations)
        rows = self.answers_by_key(answers)
        strangers = rows.keys() - {truth.answer_key for truth in truths}
        if strangers:
            raise ValueError(
                f"{answers.source}: {len(strangers)} question ids are not in the annotations, such "
                f"as {next(iter(strangers))!r:.80}; give the SEED-Bench.json of these questions"
            )
        right = np.array(
            [
                truth.answer_key in rows and rows[truth.answer_key]["text"] == truth.answer
                for truth in truths
            ],
            np.float64,
        )
        values = {"accuracy": right}
        for groups in (
            [truth.data_type for truth in truths],
            [truth.question_type for truth in truths],
        ):
            for group in sorted(set(groups)):
                name = group.lower().replace(" ", "_")
                values[f"accuracy_{name}"] = right[np.array(groups) == group]
        return values

    def score(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> dict[str, float]:
        """The accuracies, and the number of questions not answered."""
        rows = self.answers_by_key(answers)
        unanswered = sum(truth.answer_key not in rows for truth in self.required(annotations))
        return super().score(questions, answers, annotations) | {"unanswered": float(unanswered)}

    def coverage_note(
        self, questions: Sequence[Question], annotations: Annotations | None
    ) -> str | None:
        """How many questions of the file are not asked, and that they count as wrong."""
        truths = self.required(annotations)
        return count_as_wrong(len(truths) - len(questions), len(truths))

    def upload_files(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> Mapping[str, str | bytes]:
        """seed_bench_upload.jsonl: {question_id, prediction} for every question.

        Raises:
          ValueError: A question of the annotations has no answer.
        """
        rows = self.answers_by_key(answers)
        lines = []
        for truth in self.required(annotations):
            if truth.answer_key not in rows:
                raise ValueError(
                    f"the upload must answer every question of SEED-Bench, and {answers.source} "
                    f"has no answer to {truth.answer_key!r:.80}"
                )
            text = rows[truth.answer_key]["text"]
            lines.append({"question_id": truth.question_id, "prediction": text})
        return {"seed_bench_upload.jsonl": "".join(map(jsonfiles.dump_line, lines))}
