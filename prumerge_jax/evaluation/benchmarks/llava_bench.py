"""LLaVA-Bench (in the wild): GPT-4 compares each answer with a reference answer.

Follows llava/eval/eval_gpt_review_bench.py and summarize_gpt_review.py. Nothing here calls the
judge: `upload` writes what it is to be asked, `read_annotations` reads what it said.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prumerge_jax.evaluation import jsonfiles
from prumerge_jax.evaluation.answers import Answers
from prumerge_jax.evaluation.benchmarks.base import Benchmark, Question, QuestionId, is_grade

_PREFIX = "llava_bench_"
_JUDGE = {"model": "gpt-4-0314", "temperature": 0.2, "max_tokens": 1024}
_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
_UNPARSED = (-1.0, -1.0)


@dataclasses.dataclass(frozen=True)
class Review:
    """The judge's two grades, from 1 to 10; `answer_id` is that of the model's answer."""

    question_id: QuestionId
    answer_id: str
    category: str
    reference: float
    model: float


@dataclasses.dataclass(frozen=True)
class JudgeMaterial:
    """What the judge's prompt needs in addition to the model's answers.

    Attributes:
      captions: Description of the image, by image.
      references: Rows of answers_gpt4.jsonl, by question id.
      rules: Entries of rule.json, by category with the prefix llava_bench_.
    """

    captions: Mapping[str, str]
    references: Mapping[QuestionId, jsonfiles.Row]
    rules: Mapping[str, Mapping[str, str]]


@dataclasses.dataclass(frozen=True)
class Annotations:
    """Reviews by the name of their file, and the material for new ones if the folder has it."""

    reviews: Mapping[str, Sequence[Review]]
    material: JudgeMaterial | None


def parse_review(content: str) -> tuple[float, float]:
    """(reference, model) grades of a review's first line, or (-1, -1).

    After commas become spaces the line must split at single spaces into exactly two numbers: "8,10"
    parses and "8, 10" does not.
    """
    words = content.split("\n")[0].replace(",", " ").split(" ")
    if len(words) != 2:
        return _UNPARSED
    try:
        return float(words[0]), float(words[1])
    except ValueError:
        return _UNPARSED


def relative_score(reviews: Sequence[Review]) -> float:
    """Mean grade of the model in percent of the reference's, 1 decimal.

    Both means are rounded to 3 decimals first, as upstream does; it decides 64.7 against 64.8.
    """
    reference, model = _mean_grades(reviews)
    if not reference:
        raise ValueError("the judge gave every reference answer 0; ask the judge again")
    return round(model / reference * 100, 1)


def _mean_grades(reviews: Sequence[Review]) -> tuple[float, float]:
    grades = np.array([(review.reference, review.model) for review in reviews])
    reference, model = grades.mean(axis=0).tolist()
    return round(reference, 3), round(model, 3)


class LlavaBench(Benchmark[Annotations]):
    """60 questions; papers report the mean `score` of three reviews.

    Annotations: one review file, or a folder like the published one, with any of
    reviews/NAME.jsonl, and context.jsonl + answers_gpt4.jsonl + rule.json to write judge requests.
    Reviews of other models may be there too: a review belongs to the answer whose answer_id it
    names.
    """

    name = "llava_bench"
    headline = "score"
    max_new_tokens = 1024
    crops_in_llava_1_5 = True
    needs_annotations = False

    def read_annotations(self, path: pathlib.Path) -> Annotations:
        """Reads reviews and judge material, whichever there is."""
        if path.is_file():
            return Annotations({path.stem: read_reviews(path)}, None)
        files = sorted((path / "reviews").glob("*.jsonl"))
        material = None
        if (path / "context.jsonl").exists():
            material = _read_material(path)
        if not files and material is None:
            raise ValueError(f"{path} has neither reviews/*.jsonl nor context.jsonl")
        return Annotations({file.stem: read_reviews(file) for file in files}, material)

    def per_question(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> dict[str, np.ndarray]:
        """The model's grade as a fraction of 10, averaged over the review files (`model`)."""
        reviews = self._own_reviews(questions, answers, annotations)
        if not reviews:
            return {}
        grades = [[review.model / 10 for review in file] for file in reviews.values()]
        return {"model": np.mean(grades, axis=0)}

    def score(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> dict[str, float]:
        """`score`, `score_CATEGORY`, and the mean grades `reference` and `model` in percent of 10.

        Means over the review files of these answers; `score_FILE` is the score of each file.
        """
        reviews = self._own_reviews(questions, answers, annotations)
        if not reviews:
            return {}
        by_file = {f"score_{name}": relative_score(file) for name, file in reviews.items()}
        metrics = {"score": float(np.mean(list(by_file.values()))), **by_file}
        first = next(iter(reviews.values()))
        for category in sorted({review.category for review in first}):
            scores = [
                relative_score([review for review in file if review.category == category])
                for file in reviews.values()
            ]
            metrics[f"score_{category.removeprefix(_PREFIX)}"] = float(np.mean(scores))
        means = np.mean([_mean_grades(file) for file in reviews.values()], axis=0)
        metrics["reference"], metrics["model"] = (10 * means).tolist()
        return metrics

    def upload_files(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> Mapping[str, str | bytes]:
        """llava_bench_judge_requests.jsonl, if the judge's material was given."""
        if annotations is None or annotations.material is None:
            return {}
        requests = [
            judge_request(question, row, annotations.material)
            for question, row in zip(
                questions, self.in_question_order(questions, answers), strict=True
            )
        ]
        lines = "".join(map(jsonfiles.dump_line, requests))
        return {"llava_bench_judge_requests.jsonl": lines}

    def check(
        self,
        questions: Sequence[Question],
        annotations: Annotations | None,
        source: str = "the question file",
    ) -> None:
        """As `Benchmark.check`; the judge's material must cover the questions too."""
        super().check(questions, annotations, source)
        self.upload_files(questions, self._empty_answers(questions, source), annotations)

    def _own_reviews(
        self, questions: Sequence[Question], answers: Answers, annotations: Annotations | None
    ) -> dict[str, list[Review]]:
        """The review files about these answers, each in the order of the questions."""
        rows = self.in_question_order(questions, answers)
        own = {}
        for name, reviews in (annotations.reviews if annotations else {}).items():
            by_question = {review.question_id: review for review in reviews}
            ordered = [by_question.get(row["question_id"]) for row in rows]
            matching = [
                review
                for review, row in zip(ordered, rows, strict=True)
                if review is not None and review.answer_id == row.get("answer_id")
            ]
            if not matching:
                continue
            if len(matching) != len(rows) or len(reviews) != len(rows):
                raise ValueError(
                    f"{name}: {len(matching)} of {len(reviews)} reviews are of the {len(rows)} "
                    f"answers in {answers.source}; let the judge review all of them once"
                )
            own[name] = matching
        return own


def judge_request(
    question: Question, row: jsonfiles.Row, material: JudgeMaterial
) -> dict[str, Any]:
    """The chat request about one answer, and the fields that its review must carry.

    Raises:
      ValueError: Caption, reference answer or rule of the question is missing.
    """
    category = f"{_PREFIX}{question.extra['category']}"
    for what, there in (
        (f"caption of {question.image!r} in context.jsonl", question.image in material.captions),
        ("reference in answers_gpt4.jsonl", question.question_id in material.references),
        (f"rule {category} in rule.json", category in material.rules),
    ):
        if not there:
            raise ValueError(f"question_id {question.question_id!r}: no {what}")
    reference, rule = material.references[question.question_id], material.rules[category]
    role = rule["role"]
    content = (
        f"[Context]\n{material.captions[str(question.image)]}\n\n"
        f"[Question]\n{question.text}\n\n"
        f"[{role} 1]\n{reference['text']}\n\n[End of {role} 1]\n\n"
        f"[{role} 2]\n{row['text']}\n\n[End of {role} 2]\n\n"
        f"[System]\n{rule['prompt']}\n\n"
    )
    return {
        "question_id": question.question_id,
        "answer1_id": reference.get("answer_id", question.question_id),
        "answer2_id": row.get("answer_id", question.question_id),
        "category": category,
        **_JUDGE,
        "messages": [
            {"role": "system", "content": _SYSTEM},
            {"role": "user", "content": content},
        ],
    }


def read_reviews(path: pathlib.Path) -> list[Review]:
    """Reads a review file.

    Raises:
      ValueError: A review is malformed, repeated or unparsed; the reference would average the -1 of
        an unparsed one into the score.
    """
    reviews: dict[QuestionId, Review] = {}
    for number, row in enumerate(jsonfiles.read_jsonl(path), start=1):
        where = f"{path} row {number}"
        question_id = jsonfiles.field(row, "question_id", (int, str), where)
        grades = tuple(jsonfiles.field(row, "tuple", list, where))
        if question_id in reviews:
            raise ValueError(f"{where} reviews question_id {question_id!r} again")
        if len(grades) != 2 or not all(is_grade(grade, 10) for grade in grades):
            raise ValueError(
                f"{where} has no two grades from 0 to 10 but {grades!s:.80}: ask the judge again"
            )
        reviews[question_id] = Review(
            question_id,
            jsonfiles.field(row, "answer2_id", (int, str), where),
            jsonfiles.string(row, "category", where),
            *grades,
        )
    return list(reviews.values())


def _read_material(folder: pathlib.Path) -> JudgeMaterial:
    captions = {}
    for number, row in enumerate(jsonfiles.read_jsonl(folder / "context.jsonl"), start=1):
        where = f"{folder / 'context.jsonl'} row {number}"
        caption = jsonfiles.field(row, "caption", (str, list), where)
        text = caption
        if isinstance(caption, list):
            text = "\n".join(jsonfiles.strings(row, "caption", where))
        captions[jsonfiles.string(row, "image", where)] = text
    references = {}
    path = folder / "answers_gpt4.jsonl"
    for number, row in enumerate(jsonfiles.read_jsonl(path), start=1):
        where = f"{path} row {number}"
        jsonfiles.string(row, "text", where)
        references[jsonfiles.field(row, "question_id", (int, str), where)] = row
    path = folder / "rule.json"
    rules = jsonfiles.read_object(path)
    for name in rules:
        rule = jsonfiles.field(rules, name, dict, str(path))
        for part in ("role", "prompt"):
            jsonfiles.string(rule, part, f"{path} entry {name!r:.80}")
    return JudgeMaterial(captions, references, rules)
