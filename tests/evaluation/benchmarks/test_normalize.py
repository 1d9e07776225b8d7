"""The two normalisers and soft accuracies, on published examples and hand-computed values."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prumerge_jax.evaluation.benchmarks import normalize
from prumerge_jax.evaluation.benchmarks.textvqa import question_of_prompt


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2:30 p.m.", "2:30 pm"),
        ("1,000", "1000"),
        ("U.S.A.", "usa"),
        ("a/b", "b"),
        ("x-ray", "x ray"),
        ("x - ray", "x ray"),
        ("x -y p-q", "x y pq"),
        ("x- y p-q", "x y pq"),
        ("none", "0"),
        ("(yes)", "yes"),
        ("it's a dog's", "it 's dog 's"),
        ("$5.00", "$5.00"),
        ("hello.world", "helloworld"),
        ("The a an", ""),
        ("12,5 .5", "125 .5"),
        ("3.14.", "3.14"),
        ("Im", "im"),
        ("dont", "don't"),
        ("shouldntve couldnt've", "shouldntve couldn't've"),
        ("somebody'd", "somebodyd"),
        ("Ten\tor\nthree", "10 or 3"),
    ],
)
def test_evalai_quirks(text: str, expected: str) -> None:
    assert normalize.normalize_evalai(text) == expected


def test_at_most_32_periods_are_removed() -> None:
    assert normalize.normalize_evalai("a." * 40) == "a" * 33 + ".a" * 7 + "."


@given(st.text())
def test_result_is_single_spaced_and_without_marks_or_articles(text: str) -> None:
    result = normalize.normalize_evalai(text)
    assert result == " ".join(result.split())
    assert not set(result) & set('/[]"{}()=+\\_-><@`,?!;')
    assert not {"a", "an", "the", "zero", "ten"} & set(result.split())


@pytest.mark.parametrize(
    ("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)]
)
def test_soft_accuracy_over_leave_one_out_humans(agreeing: int, expected: float) -> None:
    # m of ten agree: m of the ten see m - 1 others, the rest see m.
    humans = ["yes"] * agreeing + [f"other{i}" for i in range(10 - agreeing)]
    assert normalize.m4c_accuracy("Yes.", humans) == pytest.approx(expected)
    assert normalize.vqa_accuracy("yes", humans) == pytest.approx(expected)


def test_m4c_needs_ten_humans() -> None:
    with pytest.raises(ValueError, match="9 human answers"):
        normalize.m4c_accuracy("yes", ["yes"] * 9)


def test_official_vqa_scorer_normalises_only_if_the_humans_differ() -> None:
    assert normalize.vqa_accuracy("Red.", ["red"] * 10) == 0.0
    assert normalize.vqa_accuracy("Red.", ["red"] * 9 + ["blue"]) == 1.0
    assert normalize.m4c_accuracy("Red.", ["red"] * 10) == 1.0


def test_official_vqa_scorer_lacks_the_first_steps_of_evalai() -> None:
    # It keeps possessives intact, and a comma between digits deletes every mark.
    humans = ["dog's"] * 9 + ["cat"]
    assert normalize.vqa_accuracy("dog's", humans) == 1.0
    assert normalize.vqa_accuracy("dog 's", humans) == 0.0
    assert normalize.vqa_accuracy("1,000-2", ["10002"] * 9 + ["cat"]) == 1.0
    assert normalize.m4c_accuracy("1,000-2", ["1000 2"] * 9 + ["cat"]) == 1.0


def test_vizwiz_uploads(golden) -> None:
    folder = golden / "vizwiz"
    answers = [
        json.loads(line)["text"]
        for line in (folder / "answers_llava-v1.5-13b.first2000.jsonl").open()
    ]
    upload = json.loads(
        (folder / "answers_upload_llava-v1.5-13b.first2000.json").read_text("utf-8")
    )
    equal = [
        normalize.normalize_evalai(text) == entry["answer"]
        for text, entry in zip(answers, upload, strict=True)
    ]
    assert (sum(equal), len(equal)) == (2000, 2000)


def test_textvqa_keys_and_answers(golden) -> None:
    folder = golden / "textvqa"
    answers = [
        json.loads(line) for line in (folder / "answers_llava-v1.5-13b.first1000.jsonl").open()
    ]
    expected = [
        json.loads(line) for line in (folder / "normalised_expected.first1000.jsonl").open()
    ]
    ours = [
        {
            "question_id": row["question_id"],
            "question": question_of_prompt(row["prompt"]),
            "answer": normalize.normalize_evalai(row["text"]),
        }
        for row in answers
    ]
    assert ours == expected
    assert len(ours) == 1000
