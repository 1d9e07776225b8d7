"""POPE: is this object in the image? (arXiv 2305.10355; llava/eval/eval_pope.py)"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from prumerge_jax.evaluation import jsonfiles
from prumerge_jax.evaluation.answers import Answers
from prumerge_jax.evaluation.benchmarks.base import Benchmark, Question

_PREFIX, _SUFFIX = "coco_pope_", ".json"


@dataclasses.dataclass(frozen=True)
class Label:
    """One row of a label file."""

    image: str
    text: str
    is_yes: bool


Annotations = Mapping[str, Sequence[Label]]
"""Labels by category, in the order of their files."""


def says_yes(text: str) -> bool:
    """Whether an answer counts as yes: anything without the word No, not or no before a period."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


class Pope(Benchmark[Annotations]):
    """8910 questions in three categories; papers report the mean F1.

    Annotations: the folder of coco_pope_{adversarial,popular,random}.json at commit e3e3926 of
    AoiDragon/POPE. Its newer head has 90 more random rows, and labels are matched *by order*, so
    a category is scored completely or refused.
    """

    name = "pope"
    headline = "mean_f1"

    def read_annotations(self, path: pathlib.Path) -> Annotations:
        """Reads every file of the folder; each must be a label file."""
        labels = {}
        for file in sorted(path.iterdir()):
            if not (file.name.startswith(_PREFIX) and file.name.endswith(_SUFFIX)):
                raise ValueError(
                    f"{file} is not a label file {_PREFIX}CATEGORY{_SUFFIX}; remove it"
                )
            category = file.name.removeprefix(_PREFIX).removesuffix(_SUFFIX)
            labels[category] = _read_labels(file)
        if not labels:
            raise ValueError(f"{path} holds no label file {_PREFIX}CATEGORY{_SUFFIX}")
        return labels

    def per_question(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> dict[str, np.ndarray]:
        """Right or wrong, per category (`accuracy_CATEGORY`)."""
        outcomes = self._outcomes(questions, answers, self.required(annotations))
        return {
            f"accuracy_{category}": (says == truth).astype(np.float64)
            for category, (says, truth) in outcomes.items()
        }

    def score(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> dict[str, float]:
        """Accuracy, precision, recall, F1 and share of yes per category, and `mean_f1`.

        A precision, recall or F1 of 0 / 0, where the reference divides by zero, is 0.
        """
        outcomes = self._outcomes(questions, answers, self.required(annotations))
        metrics: dict[str, float] = {}
        for category, (says, truth) in outcomes.items():
            true_yes = np.sum(says & truth)
            precision = true_yes / max(np.sum(says), 1)
            recall = true_yes / max(np.sum(truth), 1)
            values = {
                "accuracy": np.mean(says == truth),
                "precision": precision,
                "recall": recall,
                "f1": 2 * precision * recall / (precision + recall) if true_yes else 0.0,
                "yes_ratio": np.mean(says),
            }
            metrics |= {f"{name}_{category}": 100 * float(value) for name, value in values.items()}
        metrics["mean_f1"] = float(np.mean([metrics[f"f1_{category}"] for category in outcomes]))
        return metrics

    def _outcomes(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations
    ) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By category: [rows] bool, the model says yes; [rows] bool, the truth is yes."""
        asked: dict[str, list[tuple[Question, jsonfiles.Row]]] = {}
        for question, row in zip(
            questions, self.in_question_order(questions, answers), strict=True
        ):
            asked.setdefault(question.extra["category"], []).append((question, row))
        if asked.keys() != annotations.keys():
            raise ValueError(
                f"{answers.source}: questions of categories {sorted(asked, key=str)!s:.80}, labels "
                f"of {sorted(annotations)!s:.80}; the field 'category' must name a label "
                f"file {_PREFIX}CATEGORY{_SUFFIX}, and each file must be asked"
            )
        for category, rows in asked.items():
            _check_same_questions(category, [question for question, _ in rows], annotations)
        return {
            category: (
                np.array([says_yes(row["text"]) for _, row in rows]),
                np.array([label.is_yes for label in annotations[category]]),
            )
            for category, rows in asked.items()
        }


def _read_labels(file: pathlib.Path) -> list[Label]:
    labels = []
    for number, row in enumerate(jsonfiles.read_jsonl(file), start=1):
        where = f"{file} row {number}"
        label = jsonfiles.string(row, "label", where)
        if label not in ("yes", "no"):
            raise ValueError(f"{where}: label must be yes or no, not {label!r}")
        image, text = (jsonfiles.string(row, name, where) for name in ("image", "text"))
        labels.append(Label(image, text, label == "yes"))
    return labels


def _check_same_questions(
    category: str, questions: Sequence[Question], annotations: Annotations
) -> None:
    """Matching by order is right only if both files list the same questions."""
    file, labels = f"{_PREFIX}{category}{_SUFFIX}", annotations[category]
    hint = "LLaVA's question file goes with commit e3e3926 of AoiDragon/POPE"
    if len(labels) != len(questions):
        raise ValueError(
            f"{len(questions)} questions of category {category}, but {len(labels)} labels in "
            f"{file}; POPE is scored as a whole, not on a subset: {hint}"
        )
    for number, (question, label) in enumerate(zip(questions, labels, strict=True), start=1):
        if (question.image, question.text.split("\n")[0]) != (label.image, label.text):
            raise ValueError(
                f"{file} row {number} asks {label.text!r:.80} of {label.image!r:.80}, the question "
                f"file {question.text!r:.80} of {question.image!r:.80} (id "
                f"{question.question_id!r:.80}): {hint}"
            )
