"""VQAv2 (scripts/convert_vqav2_for_submission.py and the official scorer)."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from prumerge_jax.evaluation import jsonfiles
from prumerge_jax.evaluation.answers import Answers
from prumerge_jax.evaluation.benchmarks.base import Benchmark, Question
from prumerge_jax.evaluation.benchmarks.normalize import normalize_evalai, vqa_accuracy


@dataclasses.dataclass(frozen=True)
class Truth:
    """Human answers to one question, and their kind: yes/no, number or other."""

    answers: Sequence[str]
    answer_type: str


@dataclasses.dataclass(frozen=True)
class Annotations:
    """What is known of a split.

    Attributes:
      question_ids: All questions of the split, in the order of the upload.
      truths: By question id; empty for the test split, whose answers the server keeps.
    """

    question_ids: Sequence[int]
    truths: Mapping[int, Truth]


class VqaV2(Benchmark[Annotations]):
    """107,394 test-dev questions, scored by EvalAI.

    Annotations: llava_vqav2_mscoco_test2015.jsonl, all questions of the test split, which the
    upload must list; or v2_mscoco_val2014_annotations.json, to score a question file made from val.
    """

    name = "vqav2"

    def read_annotations(self, path: pathlib.Path) -> Annotations:
        """Reads the .jsonl of a test split or the official .json of a split with answers."""
        if path.suffix == ".jsonl":
            rows = jsonfiles.read_jsonl(path)
            ids = [
                jsonfiles.field(row, "question_id", int, f"{path} row {number}")
                for number, row in enumerate(rows, start=1)
            ]
            return Annotations(ids, {})
        truths = {}
        data = jsonfiles.field(jsonfiles.read_object(path), "annotations", list, str(path))
        for number, row in enumerate(data, start=1):
            where = f"{path} annotation {number}"
            humans = jsonfiles.field(row, "answers", list, where)
            if not humans:
                raise ValueError(f"{where} has no human answers")
            truths[jsonfiles.field(row, "question_id", int, where)] = Truth(
                [jsonfiles.string(human, "answer", where) for human in humans],
                jsonfiles.string(row, "answer_type", where),
            )
        return Annotations(list(truths), truths)

    def per_question(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> dict[str, np.ndarray]:
        """Official soft accuracy: `accuracy`, `accuracy_yes_no`, ...; nothing for a test split.

        Raises:
          ValueError: An asked question is not in the split.
        """
        rows = self._rows_of_split(questions, answers, annotations)
        truths = self.required(annotations).truths
        if not truths:
            return {}
        accuracies, types = [], []
        for row in rows:
            truth = truths[row["question_id"]]
            accuracies.append(vqa_accuracy(normalize_evalai(row["text"]), truth.answers))
            types.append(truth.answer_type)
        accuracy = np.array(accuracies)
        values = {"accuracy": accuracy}
        for answer_type in sorted(set(types)):
            chosen = np.array(types) == answer_type
            values[f"accuracy_{answer_type.replace('/', '_')}"] = accuracy[chosen]
        return values

    def upload_files(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> Mapping[str, str | bytes]:
        """vqav2_upload.json: every question of the split, `''` where it was not asked."""
        texts = {
            row["question_id"]: normalize_evalai(row["text"])
            for row in self._rows_of_split(questions, answers, annotations)
        }
        entries = [
            {"question_id": question_id, "answer": texts.get(question_id, "")}
            for question_id in self.required(annotations).question_ids
        ]
        return {"vqav2_upload.json": json.dumps(entries)}

    def _rows_of_split(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> list[jsonfiles.Row]:
        """The answer lines in the order of the questions, all of which must be in the split."""
        split = set(self.required(annotations).question_ids)
        rows = self.in_question_order(questions, answers)
        strangers = {row["question_id"] for row in rows} - split
        if strangers:
            raise ValueError(
                f"{len(strangers)} questions asked are not in the split, such as question_id "
                f"{min(strangers, key=str)!r:.80}; give the annotations of the split that they are "
                "from"
            )
        return rows
