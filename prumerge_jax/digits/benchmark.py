"""The miniature benchmark: `digits_vqa` in the files and by the rules of the real benchmarks.

Each family of questions is scored as the benchmark that it mirrors scores an answer. A response
may show its work first; its conclusion counts.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from prumerge_jax.data.packing import PositionIds
from prumerge_jax.digits.questions import FAMILIES, conclusion, draw_with_questions
from prumerge_jax.evaluation import jsonfiles
from prumerge_jax.evaluation.answers import Answers
from prumerge_jax.evaluation.benchmarks import registry
from prumerge_jax.evaluation.benchmarks.base import Benchmark, Question, TaskFiles
from prumerge_jax.evaluation.benchmarks.gqa import prediction
from prumerge_jax.evaluation.benchmarks.normalize import normalize_evalai
from prumerge_jax.evaluation.benchmarks.pope import says_yes
from prumerge_jax.evaluation.benchmarks.scienceqa import parse_letter

QUESTIONS_FILE = "questions.jsonl"
ANNOTATIONS_FILE = "annotations.jsonl"
IMAGE_FOLDER = "images"


class Truth(NamedTuple):
    """The right answer, and what the image shows: places, and the digit in each."""

    answer: str
    places: tuple[str, ...]
    digits: tuple[int, ...]


Annotations = Mapping[str, Truth]
"""By question id, in the order of the file."""

_IS_RIGHT: Mapping[str, Callable[[str, str], bool]] = {
    "read": lambda text, answer: normalize_evalai(text) == answer,  # TextVQA
    "presence": lambda text, answer: says_yes(text) == (answer == "yes"),  # POPE
    "count": lambda text, answer: prediction(text) == answer,  # GQA
    "compare": lambda text, answer: parse_letter(text) == answer,  # ScienceQA
}


def is_right(family: str, response: str, answer: str) -> bool:
    """Whether the conclusion of a response is the answer, by the rule of its family."""
    return _IS_RIGHT[family](conclusion(response), answer)


class Digits(Benchmark[Annotations]):
    """One question of each of four families per scene.

    Annotations: the file that `write_files` makes alongside the questions.
    """

    name = "digits"
    headline = "accuracy_mean"
    max_new_tokens = 32
    # The miniature is trained with the positions that its visual tokens had before the reduction.
    position_ids: PositionIds = "original"
    reductions = (
        "full top:tokens=54,merge=mean top:tokens=27,merge=mean top:tokens=18,merge=mean "
        "top:adaptive=attention,merge=mean top:tokens=27,merge=mean,ranking=random "
        "prumerge+:neighbours=8 prumerge:neighbours=8"
    )
    default_options: ClassVar[Mapping[str, Any]] = {"split": "test", "scenes": 1000}
    group_label = "number of digits"

    def check_default_options(self, options: Mapping[str, Any]) -> None:
        """Raises ValueError for a split that there is not, or no scenes."""
        draw_with_questions(options["split"], 0, seed=0)
        if options["scenes"] < 1:
            raise ValueError(f"digits.scenes is {options['scenes']}; expected at least 1")

    def write_default_files(self, folder: pathlib.Path, options: Mapping[str, Any]) -> None:
        """Draws scenes and questions, see `write_files`."""
        write_files(folder, split=options["split"], scenes=options["scenes"])

    def default_files(self, folder: pathlib.Path) -> TaskFiles:
        """The three that `write_files` makes."""
        return TaskFiles(folder / QUESTIONS_FILE, folder / IMAGE_FOLDER, folder / ANNOTATIONS_FILE)

    def group_of(self, question: Question, annotations: Annotations | None) -> int:
        """The number of digits in the image."""
        return len(self.required(annotations)[str(question.question_id)].digits)

    def read_annotations(self, path: pathlib.Path) -> Annotations:
        """Reads `{question_id, answer, places, digits}` lines."""
        truths = {}
        for number, row in enumerate(jsonfiles.read_jsonl(path), start=1):
            where = f"{path} row {number}"
            truths[jsonfiles.string(row, "question_id", where)] = Truth(
                answer=jsonfiles.string(row, "answer", where),
                places=tuple(jsonfiles.field(row, "places", list, where)),
                digits=tuple(jsonfiles.field(row, "digits", list, where)),
            )
        return truths

    def per_question(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> dict[str, np.ndarray]:
        """Right or wrong, per family (`accuracy_FAMILY`), and over all of them (`accuracy_mean`).

        The latter holds every answer weighted so that the families count equally in its mean.
        """
        truths = self.required(annotations)
        rows = self.in_question_order(questions, answers)
        right: dict[str, list[bool]] = {family: [] for family in FAMILIES}
        for question, row in zip(questions, rows, strict=True):
            family, key = question.extra["category"], str(question.question_id)
            if family not in right or key not in truths:
                raise ValueError(
                    f"question {key!r} of category {family!r}: expected one of {FAMILIES} and a "
                    "row of the annotations; use the two files that were written together"
                )
            right[family].append(is_right(family, row["text"], truths[key].answer))
        values = {
            f"accuracy_{family}": np.array(hits, np.float64)
            for family, hits in right.items()
            if hits
        }
        total = sum(hits.size for hits in values.values())
        weighted = [hits * total / (len(values) * hits.size) for hits in values.values()]
        return {**values, "accuracy_mean": np.concatenate(weighted)}

    def score(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> dict[str, float]:
        """Accuracy and its standard error per family, and of the mean over the families.

        The error is that of a proportion, sqrt(p (1 - p) / n); families are taken as independent.
        """
        accuracies, errors = {}, {}
        families = self.per_question(questions, answers, annotations)
        del families["accuracy_mean"]
        for name, right in families.items():
            accuracies[name] = 100 * float(np.mean(right))
            error_name = name.replace("accuracy", "standard_error")
            errors[error_name] = 100 * float(np.std(right)) / np.sqrt(right.size)
        mean_error = np.sqrt(np.sum(np.square(list(errors.values())))) / len(errors)
        return {
            **accuracies,
            "accuracy_mean": float(np.mean(list(accuracies.values()))),
            **{name: float(error) for name, error in errors.items()},
            "standard_error_mean": float(mean_error),
        }


def write_files(folder: pathlib.Path, *, split: str = "test", scenes: int, seed: int = 0) -> None:
    """Writes the question file, the annotations and the images of a split into `folder`.

    The scenes and questions are those of the data set `digits_vqa` of the same seed. The question
    file comes last and complete, so that a folder which has one is complete.

    Args:
      folder: made if it does not exist.
      split: `test` for figures to report, `validation` for tuning.
      scenes: number of scenes, from the first.
      seed: seed of the data set.

    Raises:
      ValueError: the split is unknown.
    """
    (folder / IMAGE_FOLDER).mkdir(parents=True, exist_ok=True)
    questions, annotations = [], []
    for index in range(scenes):
        scene, asked = draw_with_questions(split, index, seed=seed)
        image = f"{scene.id}.png"
        (folder / IMAGE_FOLDER / image).write_bytes(scene.png())
        for question in asked:
            question_id = f"{scene.id}_{question.family}"
            questions.append(
                {
                    "question_id": question_id,
                    "image": image,
                    "text": question.text,
                    "category": question.family,
                }
            )
            annotations.append(
                {
                    "question_id": question_id,
                    "answer": question.answer,
                    "places": scene.places,
                    "digits": scene.digits,
                }
            )
    for name, rows in ((ANNOTATIONS_FILE, annotations), (QUESTIONS_FILE, questions)):
        jsonfiles.replace_file(folder / name, "".join(map(jsonfiles.dump_line, rows)))


registry.register(Digits())
