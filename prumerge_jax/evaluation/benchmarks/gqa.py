"""GQA, testdev balanced (scripts/convert_gqa_for_eval.py and the data set's eval.py)."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from prumerge_jax.evaluation import jsonfiles
from prumerge_jax.evaluation.answers import Answers
from prumerge_jax.evaluation.benchmarks.base import Benchmark, Question


class Truth(NamedTuple):
    """The answer, and whether the question is open (not yes/no, choose, compare or logic)."""

    answer: str
    is_open: bool


Annotations = Mapping[str, Truth]
"""By question id, the balanced questions only, in the order of the file."""


def prediction(text: str) -> str:
    """What LLaVA hands to eval.py for an answer."""
    return text.rstrip(".").lower()


class Gqa(Benchmark[Annotations]):
    """12,578 questions; accuracy is exact match.

    Annotations: testdev_balanced_questions.json. The files of choices and scene graphs, missing
    from release 1.2, are not read: the metrics that need them are not computed.
    """

    name = "gqa"

    def read_annotations(self, path: pathlib.Path) -> Annotations:
        """Reads the official question file, a mapping from id to question."""
        annotations = {}
        for question_id, row in jsonfiles.read_object(path).items():
            where = f"{path} entry {question_id!r}"
            if jsonfiles.field(row, "isBalanced", bool, where):
                types = jsonfiles.field(row, "types", dict, where)
                answer = jsonfiles.string(row, "answer", where)
                structure = jsonfiles.string(types, "structural", f"{where} types")
                annotations[question_id] = Truth(answer, structure == "query")
        if not annotations:
            raise ValueError(
                f"{path} has no balanced question; give testdev_balanced_questions.json"
            )
        return annotations

    def per_question(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> dict[str, np.ndarray]:
        """Right or wrong over the balanced questions: `accuracy`, `accuracy_open`, `_binary`.

        Raises:
          ValueError: A balanced question of the annotations has no answer. GQA is scored
            completely; eval.py refuses a subset too.
        """
        truths = self.required(annotations)
        rows = self.answers_by_key(answers)
        missing = [question_id for question_id in truths if question_id not in rows]
        if missing:
            raise ValueError(
                f"{answers.source} lacks answers to {len(missing)} of the {len(truths)} balanced "
                f"questions, the first {missing[0]!r:.80}; GQA scores no subset"
            )
        right = np.array(
            [prediction(rows[key]["text"]) == truth.answer for key, truth in truths.items()],
            np.float64,
        )
        is_open = np.array([truth.is_open for truth in truths.values()])
        values = {"accuracy": right}
        values |= {
            name: right[chosen]
            for name, chosen in (("accuracy_open", is_open), ("accuracy_binary", ~is_open))
            if chosen.any()
        }
        return values

    def upload_files(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> Mapping[str, str | bytes]:
        """testdev_balanced_predictions.json, which eval.py reads."""
        predictions = [
            {"questionId": row["question_id"], "prediction": prediction(row["text"])}
            for row in self.in_question_order(questions, answers)
        ]
        return {"testdev_balanced_predictions.json": json.dumps(predictions)}
