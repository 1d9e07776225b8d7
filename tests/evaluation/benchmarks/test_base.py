"""What all benchmarks share: protocols, readers, the fit of answers and questions, the registry."""

import json
import re

import pytest

from prumerge_jax.evaluation.answers import Answers
from prumerge_jax.evaluation.benchmarks.base import PROTOCOLS
from prumerge_jax.evaluation.benchmarks.registry import BENCHMARKS, benchmark

CROPPED_IN_OCTOBER_2023 = {"scienceqa", "llava_bench", "mm_vet"}
LONG_ANSWERS = {"scienceqa", "llava_bench", "mm_vet", "mmbench", "mmbench_cn"}
OFFICIAL = {
    *("vqav2", "gqa", "vizwiz", "scienceqa", "textvqa", "pope", "mme", "mmbench", "mmbench_cn"),
    *("seed_bench", "llava_bench", "mm_vet"),
}


def test_image_modes_and_token_limits_of_all_benchmarks() -> None:
    assert BENCHMARKS.keys() >= OFFICIAL
    for name in OFFICIAL:
        entry = benchmark(name)
        assert entry.name == name
        expected = "crop" if name in CROPPED_IN_OCTOBER_2023 else "pad"
        assert [entry.image_mode(protocol) for protocol in PROTOCOLS] == [expected, "pad"]
        assert entry.max_new_tokens == (1024 if name in LONG_ANSWERS else 128)


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ValueError, match=r"'popo'.*gqa.*pope"):
        benchmark("popo")
    with pytest.raises(ValueError, match=r"'llava-2'.*llava-1.5, llava-1.6"):
        benchmark("pope").image_mode("llava-2")


def write_questions(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [
    {"question_id": 1, "image": "a.jpg", "text": "One?\nAnswer.", "category": "x"},
    {"question_id": 2, "image": "a.jpg", "text": "Two?\nAnswer.", "category": "x"},
]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question_id": 1}, "row 2 repeats row 1: 1"),
        ({"image": None}, "row 2: field 'image' must be str, not None"),
        ({"question_id": 2.0}, "row 2: field 'question_id' must be int or str, not 2.0"),
    ],
)
def test_bad_question_rows_are_named(tmp_path, change, message: str) -> None:
    path = write_questions(tmp_path / "questions.jsonl", [ROWS[0], ROWS[1] | change])
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        benchmark("pope").read_questions(path)
    assert str(path) in str(error.value)


def test_mme_and_textvqa_ids_may_repeat_but_not_with_the_same_question(tmp_path) -> None:
    same_id = [row | {"question_id": "count/1.jpg"} for row in ROWS]
    path = write_questions(tmp_path / "questions.jsonl", same_id)
    for name in ("mme", "textvqa"):
        assert len(benchmark(name).read_questions(path)) == 2
    write_questions(path, [same_id[0], same_id[0]])
    for name in ("mme", "textvqa"):
        with pytest.raises(ValueError, match="row 2 repeats row 1"):
            benchmark(name).read_questions(path)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1], "answers.jsonl lacks answers to 1 of 2 questions, the first to question row 2, 2"),
        ([1, 2, 1], "answers.jsonl row 3 answers 1 again, after row 1"),
        ([1, "2", 2], "has 1 answers to no question of the 2, the first in row 2, question_id '2'"),
    ],
)
def test_answers_must_fit_the_questions(tmp_path, ids, message: str) -> None:
    pope = benchmark("pope")
    questions = pope.read_questions(write_questions(tmp_path / "questions.jsonl", ROWS))
    rows = [{"question_id": name, "prompt": "One?\nAnswer.", "text": "Yes"} for name in ids]
    with pytest.raises(ValueError, match=re.escape(message)):
        pope.in_question_order(questions, Answers("answers.jsonl", rows))


def test_answers_are_brought_into_question_order(tmp_path) -> None:
    pope = benchmark("pope")
    questions = pope.read_questions(write_questions(tmp_path / "questions.jsonl", ROWS))
    rows = [pope.answer_row(question, str(question.question_id)) for question in questions]
    shuffled = Answers("answers.jsonl", rows[::-1])
    assert pope.in_question_order(questions, shuffled) == rows
    assert rows[0] == {"question_id": 1, "prompt": "One?\nAnswer.", "text": "1"}


@pytest.mark.parametrize("name", sorted(OFFICIAL))
def test_scores_that_need_annotations_say_so(name: str) -> None:
    entry = benchmark(name)
    if entry.needs_annotations:
        with pytest.raises(ValueError, match=f"{name} needs annotations"):
            entry.score([], Answers("answers.jsonl", []), None)
    else:
        assert entry.score([], Answers("answers.jsonl", []), None) == {}
