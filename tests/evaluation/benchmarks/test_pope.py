import json

import numpy as np
import pytest

from prumerge_jax.evaluation.answers import Answers, read_answers
from prumerge_jax.evaluation.benchmarks.base import Question
from prumerge_jax.evaluation.benchmarks.pope import Label, Pope, says_yes

POPE = Pope()


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("Yes", True),
        ("", True),
        ("NO", True),
        ("None", True),
        ("No", False),
        ("no, it is", False),
        ("Yes. No", True),
        ("There is not, I think.", False),
        ("There isn't", True),
        ("\nno", True),
    ],
)
def test_reading_an_answer(text: str, yes: bool) -> None:
    assert says_yes(text) is yes


def question(number: int, category: str = "random", image: str = "i.jpg") -> Question:
    return Question(number, image, f"Is {number} there?\nAnswer.", {"category": category})


def label(number: int, is_yes: bool) -> Label:
    return Label("i.jpg", f"Is {number} there?", is_yes)


def test_metrics_of_a_hand_computed_table() -> None:
    # Truth yes yes yes no no; says yes no yes yes no: TP 2, FP 1, TN 1, FN 1.
    questions = [question(i) for i in range(5)]
    texts = ["Yes", "No", "Yes", "Yes", "No"]
    answers = Answers("a", [POPE.answer_row(*pair) for pair in zip(questions, texts, strict=True)])
    labels = {
        "random": [label(i, truth) for i, truth in enumerate([True, True, True, False, False])]
    }
    metrics = POPE.score(questions, answers, labels)
    assert metrics == pytest.approx(
        {
            "accuracy_random": 60,
            "precision_random": 200 / 3,
            "recall_random": 200 / 3,
            "f1_random": 200 / 3,
            "yes_ratio_random": 60,
            "mean_f1": 200 / 3,
        }
    )
    values = POPE.per_question(questions, answers, labels)["accuracy_random"]
    assert values.tolist() == [1, 0, 1, 0, 1]


def test_never_yes_scores_zero_instead_of_dividing_by_zero() -> None:
    questions = [question(0), question(1)]
    answers = Answers("a", [POPE.answer_row(entry, "No") for entry in questions])
    metrics = POPE.score(questions, answers, {"random": [label(0, True), label(1, False)]})
    assert (metrics["f1_random"], metrics["accuracy_random"]) == (0, 50)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"random": [label(0, True)]}, "2 questions of category random, but 1 labels"),
        ({"random": [label(1, True), label(0, True)]}, "row 1 asks 'Is 1 there\\?'"),
        ({"popular": [label(0, True), label(1, True)]}, r"categories \['random'\], labels of"),
    ],
)
def test_labels_of_another_version_are_refused(labels, message: str) -> None:
    questions = [question(0), question(1)]
    answers = Answers("a", [POPE.answer_row(entry, "No") for entry in questions])
    with pytest.raises(ValueError, match=message):
        POPE.score(questions, answers, labels)


def test_label_folder_is_checked(tmp_path) -> None:
    with pytest.raises(ValueError, match="holds no label file"):
        POPE.read_annotations(tmp_path)
    rows = [{"image": "i", "text": "q", "label": "maybe"}]
    file = tmp_path / "coco_pope_random.json"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    with pytest.raises(ValueError, match=r"coco_pope_random.json row 1: label must be yes or no"):
        POPE.read_annotations(tmp_path)
    (tmp_path / "aokvqa_pope_random.json").write_text("")
    with pytest.raises(ValueError, match="aokvqa_pope_random.json is not a label file"):
        POPE.read_annotations(tmp_path)


def test_official_predictions(golden) -> None:
    folder = golden / "pope"
    questions = POPE.read_questions(folder / "llava_pope_test.jsonl")
    answers = read_answers(folder / "answers_llava-v1.5-13b.jsonl")
    labels = POPE.read_annotations(folder / "labels")
    metrics = POPE.score(questions, answers, labels)
    expected = {
        "adversarial": (0.855000, 0.909931, 0.788000, 0.844587, 0.433000),
        "popular": (0.874333, 0.952458, 0.788000, 0.862459, 0.413667),
        "random": (0.880069, 0.974444, 0.788000, 0.871360, 0.416838),
    }
    for category, values in expected.items():
        names = ("accuracy", "precision", "recall", "f1", "yes_ratio")
        ours = [metrics[f"{name}_{category}"] / 100 for name in names]
        assert ours == pytest.approx(values, abs=5e-7)
    assert metrics["mean_f1"] == pytest.approx(85.94688, abs=5e-6)
    values = POPE.per_question(questions, answers, labels)
    assert {name: len(value) for name, value in values.items()} == {
        "accuracy_adversarial": 3000,
        "accuracy_popular": 3000,
        "accuracy_random": 2910,
    }
    assert np.sum(values["accuracy_random"]) == 1182 + 1379


def test_official_predictions_against_labels_out_of_order(golden) -> None:
    folder = golden / "pope"
    questions = POPE.read_questions(folder / "llava_pope_test.jsonl")
    answers = read_answers(folder / "answers_llava-v1.5-13b.jsonl")
    labels = dict(POPE.read_annotations(folder / "labels"))
    labels["random"] = [*labels["random"][1:], labels["random"][0]]
    with pytest.raises(ValueError, match=r"coco_pope_random.json row 1 .*e3e3926"):
        POPE.score(questions, answers, labels)
