"""What does not fit is refused before a question is asked, in the words of the scorer."""

import json
import os
from typing import Any

import pytest

from prumerge_jax.digits.benchmark import Truth as DigitsTruth
from prumerge_jax.evaluation.answers import Answers
from prumerge_jax.evaluation.benchmarks import gqa, llava_bench, pope, scienceqa, seed_bench, vqav2
from prumerge_jax.evaluation.benchmarks.base import Question
from prumerge_jax.evaluation.benchmarks.registry import benchmark

TEXT = "Is it?\nAnswer the question using a single word or phrase."


def question(name: int | str, **extra: Any) -> Question:
    return Question(name, "i.jpg", TEXT, extra)


def option_row(index: int, answer: str | None) -> Question:
    return Question(
        index, b"i", TEXT, {"prompt": "q", "options": ("a", "b"), "cells": {"answer": answer}}
    )


def review(question_id: int) -> llava_bench.JudgeMaterial:
    return llava_bench.JudgeMaterial(
        {"i.jpg": "an image"},
        {question_id: {"text": "the reference"}},
        {"llava_bench_conv": {"role": "Assistant", "prompt": "compare"}},
    )


LABEL = pope.Label("i.jpg", "Is it?", True)
KEYS = {"1": scienceqa.Key(0, 2), "2": scienceqa.Key(1, 2)}
SEED = [seed_bench.Truth(1, "A", "image", "Scene"), seed_bench.Truth(2, "B", "image", "Scene")]
MISFITS = {
    "pope: no category": ("pope", [question(1, category=None)], {"random": [LABEL]}),
    "pope: a subset": ("pope", [question(1, category="random")], {"random": [LABEL, LABEL]}),
    "gqa: a subset": (
        "gqa",
        [question("1")],
        {"1": gqa.Truth("yes", False), "2": gqa.Truth("no", False)},
    ),
    "scienceqa": ("scienceqa", [question("9")], KEYS),
    "seed_bench": ("seed_bench", [question(9)], SEED),
    "textvqa": ("textvqa", [question("a")], {("b", "is it?"): ["yes"] * 10}),
    "vizwiz": ("vizwiz", [question(1)], {"other.jpg": ["yes"]}),
    "vqav2": ("vqav2", [question(1)], vqav2.Annotations([2], {2: vqav2.Truth(["yes"], "yes/no")})),
    "vqav2, test split": ("vqav2", [question(1)], vqav2.Annotations([2], {})),
    "mme": ("mme", [question("count/1.jpg")], {("count", "1.txt", "Is that?"): "Yes"}),
    "mme: half an image": (
        "mme",
        [question("count/1.jpg")],
        {("count", "1.txt", "Is it? Please answer yes or no."): "Yes"},
    ),
    "mm_vet": ("mm_vet", [question(0)], {"v1_0": [1.0], "v1_1": [0.5]}),
    "mmbench": ("mmbench", [option_row(0, "A"), option_row(1, None)], None),
    "digits: other annotations": (
        "digits",
        [question("a", category="read")],
        {"b": DigitsTruth("3", ("north",), (3,))},
    ),
    "digits: no category": (
        "digits",
        [question("a", category=None)],
        {"a": DigitsTruth("3", ("north",), (3,))},
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfits_are_refused_beforehand_as_by_the_scorer(case: str) -> None:
    name, questions, annotations = MISFITS[case]
    entry = benchmark(name)
    with pytest.raises(ValueError, match=".") as beforehand:
        entry.check(questions, annotations, "questions.jsonl")
    rows = [entry.answer_row(each, "A long answer: yes, no or B.") for each in questions]
    with pytest.raises(ValueError, match=".") as afterwards:
        entry.score(questions, Answers("questions.jsonl", rows), annotations)
    assert str(beforehand.value) == str(afterwards.value)
    assert "\n" not in str(beforehand.value)


def test_what_the_judge_needs_must_cover_the_questions() -> None:
    bench = benchmark("llava_bench")
    asked = [question(3, category="conv")]
    bench.check(asked, llava_bench.Annotations({}, review(3)))
    with pytest.raises(ValueError, match="question_id 3: no reference in answers_gpt4.jsonl"):
        bench.check(asked, llava_bench.Annotations({}, review(4)))


def test_subsets_that_are_scored_say_how() -> None:
    for name, questions, annotations in (
        ("scienceqa", [question("1")], KEYS),
        ("seed_bench", [question(1)], SEED),
    ):
        entry = benchmark(name)
        entry.check(questions, annotations)
        note = entry.coverage_note(questions, annotations)
        assert note == "1 of the 2 questions are not asked and count as wrong"
    assert "must answer every question" in str(benchmark("seed_bench").upload_problem([], SEED))
    everything = [question(1), question(2)]
    assert benchmark("seed_bench").coverage_note(everything, SEED) is None
    assert benchmark("seed_bench").upload_problem(everything, SEED) is None


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("gqa", "a.json", [], "is not a JSON object"),
        ("gqa", "a.json", {"1": 5}, "entry '1' is not a JSON object"),
        ("gqa", "a.json", {"1": {"isBalanced": True, "types": {}, "answer": "a"}}, "'structural'"),
        ("vizwiz", "a.json", {}, "is not a JSON list"),
        ("vizwiz", "a.json", [{"image": "a", "answers": []}], "has no human answers"),
        ("seed_bench", "a.json", {"question_type": {}, "questions": [3]}, "question 1 is not a"),
        ("textvqa", "a.json", {"data": [{"answers": [1] * 10}]}, "strings only, not 1"),
        ("mm_vet", "a.json", {"v1_0": {"score": ["1"]}}, "numbers from 0 to 1"),
        ("vqav2", "a.json", {"annotations": [[]]}, "annotation 1 is not a JSON object"),
    ],
)
def test_malformed_annotations_are_named(tmp_path, name, file, content, message) -> None:
    path = tmp_path / file
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        benchmark(name).read_annotations(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    "content", [b"[" * 200_000, b'{"a": NaN}', b'{"a": 1, "a": 2}', b"\xff\xfe", b""]
)
@pytest.mark.parametrize("name", ["gqa", "vizwiz", "seed_bench", "textvqa", "mm_vet", "vqav2"])
def test_annotations_that_are_no_strict_json_are_refused_in_one_line(
    tmp_path, name: str, content: bytes
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json") as error:
        benchmark(name).read_annotations(path)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


def test_a_pipe_is_not_waited_for(tmp_path) -> None:
    path = tmp_path / "questions.jsonl"
    os.mkfifo(path)
    for name in ("pope", "scienceqa", "mmbench", "questions"):
        with pytest.raises(OSError, match=r"questions\.jsonl is not a regular file"):
            benchmark(name).read_questions(path)


@pytest.mark.parametrize("content", [b"index\timage\n\xff\t1\n", b"index\t\0\n\0"])
def test_a_table_that_is_no_text_is_named(tmp_path, content: bytes) -> None:
    path = tmp_path / "table.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"table\.tsv"):
        benchmark("mmbench").read_questions(path)


def test_a_byte_order_mark_is_skipped(tmp_path) -> None:
    path = tmp_path / "questions.jsonl"
    row = json.dumps({"question_id": 1, "image": "a.png", "text": "What?"})
    path.write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\n")
    (asked,) = benchmark("questions").read_questions(path)
    assert (asked.question_id, asked.image, asked.text) == (1, "a.png", "What?")
