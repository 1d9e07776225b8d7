"""VizWiz-VQA: photos by blind people (scripts/convert_vizwiz_for_submission.py)."""

import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from prumerge_jax.evaluation import jsonfiles
from prumerge_jax.evaluation.answers import Answers
from prumerge_jax.evaluation.benchmarks.base import Benchmark, Question
from prumerge_jax.evaluation.benchmarks.normalize import normalize_evalai, vqa_accuracy

Annotations = Mapping[str, Sequence[str]]
"""Human answers by image name."""


class VizWiz(Benchmark[Annotations]):
    """8000 test questions, scored by EvalAI.

    Annotations, where there are any: val.json of the data set, a list of
    `{image, answers: [{answer}, ...]}`, for a question file made from that split.
    """

    name = "vizwiz"
    needs_annotations = False

    def read_annotations(self, path: pathlib.Path) -> Annotations:
        """Reads an official annotation file that has answers."""
        annotations = {}
        for number, row in enumerate(jsonfiles.read_list(path), start=1):
            where = f"{path} entry {number}"
            humans = jsonfiles.field(row, "answers", list, where)
            if not humans:
                raise ValueError(f"{where} has no human answers")
            annotations[jsonfiles.string(row, "image", where)] = [
                jsonfiles.string(human, "answer", where) for human in humans
            ]
        return annotations

    def per_question(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> dict[str, np.ndarray]:
        """Official VQA soft accuracy of the uploaded answers (`accuracy`); nothing for the test."""
        if annotations is None:
            return {}
        values = []
        for entry in self._entries(questions, answers):
            if entry["image"] not in annotations:
                raise ValueError(
                    f"no annotation for image {entry['image']:.80}; give the annotations of the "
                    "split that the questions are from"
                )
            values.append(vqa_accuracy(entry["answer"], annotations[entry["image"]]))
        return {"accuracy": np.array(values)}

    def upload_files(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> Mapping[str, str | bytes]:
        """vizwiz_upload.json, a list of {image, answer}."""
        return {"vizwiz_upload.json": json.dumps(self._entries(questions, answers))}

    def _entries(self, questions: Sequence[Question], answers: Answers) -> list[dict[str, str]]:
        return [
            {"image": str(question.image), "answer": normalize_evalai(row["text"])}
            for question, row in zip(
                questions, self.in_question_order(questions, answers), strict=True
            )
        ]
