import json

import pytest

from prumerge_jax.evaluation.answers import Answers, read_answers
from prumerge_jax.evaluation.benchmarks.base import Question
from prumerge_jax.evaluation.benchmarks.mm_vet import MmVet

MM_VET = MmVet()


@pytest.mark.parametrize(("size", "mean"), [("13b", 36.1468), ("7b", 31.1927)])
def test_official_predictions(golden, tmp_path, size: str, mean: float) -> None:
    folder = golden / "mm_vet"
    questions = MM_VET.read_questions(folder / "llava-mm-vet.jsonl")
    answers = read_answers(folder / f"answers_llava-v1.5-{size}.jsonl")
    prompts = [MM_VET.answer_row(question, "")["prompt"] for question in questions]
    assert prompts == [row["prompt"] for row in answers.rows]
    (path,) = MM_VET.upload(questions, answers, None, tmp_path)
    official = folder / f"results_llava-v1.5-{size}.json"
    assert path.read_bytes() == official.read_bytes()
    grades = MM_VET.read_annotations(folder / f"llava-v1.5-{size}_gpt-4-grade-1runs.json")
    assert len(grades) == 218
    assert MM_VET.score(questions, answers, grades) == {"score": pytest.approx(mean, abs=5e-5)}


def test_grades_of_several_runs_are_averaged_and_must_fit(tmp_path) -> None:
    path = tmp_path / "grades.json"
    path.write_text(json.dumps({"v1_0": {"score": [1.0, 0.5]}, "v1_1": {"score": [0.0, 0.1]}}))
    grades = MM_VET.read_annotations(path)
    questions = [Question(i, "v1_0.png", "?") for i in (0, 1)]
    answers = Answers("a", [MM_VET.answer_row(question, "x") for question in questions])
    assert MM_VET.score(questions, answers, grades) == {"score": pytest.approx(40)}
    with pytest.raises(ValueError, match="differ in 1 questions, such as 'v1_1'"):
        MM_VET.score(questions[:1], Answers("a", answers.rows[:1]), grades)
    path.write_text(json.dumps({"v1_0": {"score": [7]}}))
    with pytest.raises(ValueError, match="'v1_0': grades must be numbers from 0 to 1"):
        MM_VET.read_annotations(path)
