import json

import pytest

from prumerge_jax.evaluation.answers import Answers, read_answers
from prumerge_jax.evaluation.benchmarks.base import Question
from prumerge_jax.evaluation.benchmarks.gqa import Gqa, prediction

GQA = Gqa()


def test_trailing_periods_go_and_others_stay() -> None:
    assert [prediction(text) for text in ("Yes.", "U.S..", "No .", "RED")] == [
        *("yes", "u.s", "no ", "red")
    ]


def test_accuracy_counts_balanced_questions_only(tmp_path) -> None:
    def truth(answer: str, structural: str, balanced: bool) -> dict:
        return {"answer": answer, "types": {"structural": structural}, "isBalanced": balanced}

    path = tmp_path / "testdev_balanced_questions.json"
    entries = {
        "1": truth("yes", "verify", True),
        "2": truth("red", "query", True),
        "3": truth("no", "logical", True),
        "4": truth("blue", "query", False),
    }
    path.write_text(json.dumps(entries))
    truths = GQA.read_annotations(path)
    questions = [Question(name, "n1.jpg", f"{name}?") for name in "1234"]
    texts = ["Yes.", "green", "no", "red"]
    answers = Answers("a", [GQA.answer_row(*pair) for pair in zip(questions, texts, strict=True)])
    assert GQA.score(questions, answers, truths) == pytest.approx(
        {"accuracy": 200 / 3, "accuracy_open": 0, "accuracy_binary": 100}
    )
    with pytest.raises(ValueError, match="lacks answers to 2 of the 3 balanced questions.*'2'"):
        GQA.score(questions, Answers("a", answers.rows[:1]), truths)


def test_official_conversion(golden, tmp_path) -> None:
    folder = golden / "gqa"
    questions = GQA.read_questions(folder / "llava_gqa_testdev_balanced.first1000.jsonl")
    answers = read_answers(folder / "answers_llava-v1.5-13b.first1000.jsonl")
    (path,) = GQA.upload(questions, answers, None, tmp_path)
    ours = json.loads(path.read_text())
    assert ours == json.loads((folder / "predictions_expected.first1000.json").read_text())
    assert len(ours) == 1000
    assert sum(entry["prediction"] == "yes" for entry in ours) == 189
