"""TextVQA: reading text in images (llava/eval/eval_textvqa.py)."""

import pathlib
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from prumerge_jax.evaluation import jsonfiles
from prumerge_jax.evaluation.answers import Answers
from prumerge_jax.evaluation.benchmarks.base import Benchmark, Question, QuestionId
from prumerge_jax.evaluation.benchmarks.normalize import m4c_accuracy

_OCR = "Reference OCR token:"

Annotations = Mapping[tuple[str, str], Sequence[str]]
"""Ten human answers by (image id, question in lower case)."""


def question_of_prompt(prompt: str) -> str:
    """The bare question, in lower case, of a prompt with or without a line of OCR tokens.

    Raises:
      ValueError: The prompt is not question, instruction and at most one OCR line.
    """
    lines = prompt.split("\n")
    if len(lines) == 3 and _OCR in prompt:
        return lines[1 if lines[0].startswith(_OCR) else 0].lower()
    if len(lines) == 2:
        return lines[0].lower()
    raise ValueError(f"no TextVQA prompt (question, OCR line, instruction): {prompt!r:.80}")


class TextVqa(Benchmark[Annotations]):
    """5000 questions; an image has several, so question ids repeat.

    Annotations: TextVQA_0.5.1_val.json.
    """

    name = "textvqa"

    def key(self, question_id: QuestionId, prompt: str) -> Hashable:
        """(image id, question)."""
        return question_id, question_of_prompt(prompt)

    def read_annotations(self, path: pathlib.Path) -> Annotations:
        """Reads the official annotation file."""
        annotations = {}
        data = jsonfiles.field(jsonfiles.read_object(path), "data", list, str(path))
        for number, row in enumerate(data, start=1):
            where = f"{path} data entry {number}"
            humans = jsonfiles.strings(row, "answers", where)
            if len(humans) != 10:
                raise ValueError(f"{where} has {len(humans)} human answers instead of 10")
            question = jsonfiles.string(row, "question", where).lower()
            annotations[jsonfiles.string(row, "image_id", where), question] = humans
        return annotations

    def per_question(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> dict[str, np.ndarray]:
        """M4C soft accuracy of each question (`accuracy`)."""
        truth = self.required(annotations)
        values = []
        for row in self.in_question_order(questions, answers):
            key = row["question_id"], question_of_prompt(row["prompt"])
            if key not in truth:
                raise ValueError(
                    f"{answers.source}: no annotation for image and question {key!r:.160}"
                )
            values.append(m4c_accuracy(row["text"], truth[key]))
        return {"accuracy": np.array(values)}
