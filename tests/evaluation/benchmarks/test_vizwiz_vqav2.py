"""The two benchmarks that upload normalised answers and can score a split with answers."""

import json

import pytest

from prumerge_jax.evaluation.answers import Answers, read_answers
from prumerge_jax.evaluation.benchmarks.base import Question
from prumerge_jax.evaluation.benchmarks.vizwiz import VizWiz
from prumerge_jax.evaluation.benchmarks.vqav2 import Annotations, VqaV2

VIZWIZ, VQAV2 = VizWiz(), VqaV2()


def humans(*answers: str) -> list[dict]:
    return [{"answer": answer} for answer in answers]


def test_vizwiz_upload_of_official_predictions(golden, tmp_path) -> None:
    folder = golden / "vizwiz"
    questions = VIZWIZ.read_questions(folder / "llava_test.first2000.jsonl")
    answers = read_answers(folder / "answers_llava-v1.5-13b.first2000.jsonl")
    (path,) = VIZWIZ.upload(questions, answers, None, tmp_path)
    ours = json.loads(path.read_text())
    official = (folder / "answers_upload_llava-v1.5-13b.first2000.json").read_text("utf-8")
    assert ours == json.loads(official)
    assert len(ours) == 2000


def test_vizwiz_accuracy_of_a_split_with_answers(tmp_path) -> None:
    path = tmp_path / "val.json"
    path.write_text(
        json.dumps([{"image": "v.jpg", "answers": humans(*["Two"] * 3, *["three"] * 7)}])
    )
    questions = [Question(0, "v.jpg", "How many?")]
    answers = Answers("a", [VIZWIZ.answer_row(questions[0], "two.")])
    # Three of ten agree: those see two others, the seven see three.
    metrics = VIZWIZ.score(questions, answers, VIZWIZ.read_annotations(path))
    assert metrics == pytest.approx({"accuracy": 100 * (3 * 2 / 3 + 7) / 10})
    with pytest.raises(ValueError, match="no annotation for image v.jpg"):
        VIZWIZ.score(questions, answers, {})


def test_vqav2_upload_lists_the_whole_split_in_its_order(tmp_path) -> None:
    split = tmp_path / "llava_vqav2_mscoco_test2015.jsonl"
    split.write_text("".join(json.dumps({"question_id": name}) + "\n" for name in (30, 10, 20)))
    annotations = VQAV2.read_annotations(split)
    questions = [Question(10, "a.jpg", "a?"), Question(20, "a.jpg", "b?")]
    rows = [VQAV2.answer_row(question, "It's a dog.") for question in questions]
    answers = Answers("a", rows)
    (path,) = VQAV2.upload(questions, answers, annotations, tmp_path)
    assert json.loads(path.read_text()) == [
        {"question_id": 30, "answer": ""},
        {"question_id": 10, "answer": "it 's dog"},
        {"question_id": 20, "answer": "it 's dog"},
    ]
    assert VQAV2.score(questions, answers, annotations) == {}
    with pytest.raises(ValueError, match="1 questions asked are not in the split.*question_id 20"):
        VQAV2.upload(questions, answers, Annotations([10, 30], {}), tmp_path)


def test_vqav2_accuracy_by_answer_type(tmp_path) -> None:
    def annotation(name: int, answer_type: str, *answers: str) -> dict:
        return {"question_id": name, "answer_type": answer_type, "answers": humans(*answers)}

    path = tmp_path / "v2_mscoco_val2014_annotations.json"
    entries = [
        annotation(1, "yes/no", *["yes"] * 10),
        annotation(2, "number", *["2"] * 9, "3"),
        annotation(3, "other", *["red"] * 10),
    ]
    path.write_text(json.dumps({"annotations": entries}))
    annotations = VQAV2.read_annotations(path)
    assert annotations.question_ids == [1, 2, 3]
    questions = [Question(name, "a.jpg", f"{name}?") for name in (1, 2, 3)]
    texts = ["Yes.", "two", "blue"]
    rows = [VQAV2.answer_row(*pair) for pair in zip(questions, texts, strict=True)]
    assert VQAV2.score(questions, Answers("a", rows), annotations) == pytest.approx(
        {
            "accuracy": 200 / 3,
            "accuracy_yes_no": 100,
            "accuracy_number": 100,
            "accuracy_other": 0,
        }
    )
