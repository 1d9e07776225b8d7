import json
import re

import pytest

from prumerge_jax.evaluation.answers import Answers
from prumerge_jax.evaluation.benchmarks.base import Question
from prumerge_jax.evaluation.benchmarks.seed_bench import SeedBench

SEED = SeedBench()


@pytest.fixture
def truths(tmp_path):
    def row(question_id: str, answer: str, data_type: str, question_type: int) -> dict:
        return {
            "question_id": question_id,
            "answer": answer,
            "data_type": data_type,
            "question_type_id": question_type,
        }

    path = tmp_path / "SEED-Bench.json"
    questions = [
        row("101", "A", "image", 1),
        row("102", "B", "image", 2),
        row("v1", "C", "video", 10),
    ]
    types = {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10}
    path.write_text(json.dumps({"questions": questions, "question_type": types}))
    return SEED.read_annotations(path)


def answers(*pairs) -> Answers:
    return Answers("a.jsonl", [SEED.answer_row(Question(i, "x", "?"), text) for i, text in pairs])


def test_only_the_bare_letter_is_right(truths) -> None:
    metrics = SEED.score([], answers((101, "A"), (102, "B."), ("v1", "C")), truths)
    assert metrics == pytest.approx(
        {
            "accuracy": 200 / 3,
            "accuracy_image": 50,
            "accuracy_video": 100,
            "accuracy_scene_understanding": 100,
            "accuracy_instance_identity": 0,
            "accuracy_action_recognition": 100,
            "unanswered": 0,
        }
    )


def test_missing_answers_are_wrong_and_counted_but_not_uploaded(truths, tmp_path) -> None:
    metrics = SEED.score([], answers((101, "A")), truths)
    assert (metrics["accuracy"], metrics["unanswered"]) == (pytest.approx(100 / 3), 2)
    with pytest.raises(ValueError, match=re.escape("a.jsonl has no answer to 102")):
        SEED.upload([], answers((101, "A")), truths, tmp_path)


def test_upload_has_the_official_ids(truths, tmp_path) -> None:
    (path,) = SEED.upload([], answers(("v1", "C"), (102, "B"), (101, "A")), truths, tmp_path)
    assert [json.loads(line) for line in path.open()] == [
        {"question_id": "101", "prediction": "A"},
        {"question_id": "102", "prediction": "B"},
        {"question_id": "v1", "prediction": "C"},
    ]
