"""MM-Vet: open questions graded by GPT-4 (arXiv 2308.02490; scripts/convert_mmvet_for_eval.py)."""

import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from prumerge_jax.evaluation import jsonfiles
from prumerge_jax.evaluation.answers import Answers
from prumerge_jax.evaluation.benchmarks.base import Benchmark, Question, is_grade

Annotations = Mapping[str, Sequence[float]]
"""Grades in [0, 1], one per run of the judge, by `v1_<question_id>`."""


class MmVet(Benchmark[Annotations]):
    """218 questions.

    Annotations, once the judge has graded: the grade file MODEL_gpt-4-grade-*runs.json that the
    official notebook writes from the uploaded answers. Scores per capability need its mm-vet.json
    and are left to the notebook.
    """

    name = "mm_vet"
    headline = "score"
    max_new_tokens = 1024
    crops_in_llava_1_5 = True
    needs_annotations = False

    def read_annotations(self, path: pathlib.Path) -> Annotations:
        """Reads a grade file, `{"v1_0": {"score": [0.5, ...]}, ...}`."""
        grades = {}
        for name, entry in jsonfiles.read_object(path).items():
            where = f"{path} entry {name!r}"
            scores = jsonfiles.field(entry, "score", list, where)
            if not scores or not all(is_grade(score, 1) for score in scores):
                raise ValueError(f"{where}: grades must be numbers from 0 to 1, not {scores!s:.80}")
            grades[name] = scores
        return grades

    def per_question(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> dict[str, np.ndarray]:
        """The mean grade of each question (`score`); nothing without grades."""
        if annotations is None:
            return {}
        names = [_name(row) for row in self.in_question_order(questions, answers)]
        if set(names) != annotations.keys():
            different = sorted(set(names) ^ annotations.keys())
            raise ValueError(
                f"{answers.source} and the grades differ in {len(different)} questions, such as "
                f"{different[0]!r:.80}"
            )
        return {"score": np.array([np.mean(annotations[name]) for name in names])}

    def upload_files(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> Mapping[str, str | bytes]:
        """mm_vet_results.json, which the judge grades."""
        texts = {_name(row): row["text"] for row in self.in_question_order(questions, answers)}
        return {"mm_vet_results.json": json.dumps(texts, indent=2)}


def _name(row: jsonfiles.Row) -> str:
    return f"v1_{row['question_id']}"
