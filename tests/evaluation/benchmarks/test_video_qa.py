import json
import pathlib

import pytest

from prumerge_jax.evaluation.answers import Answers
from prumerge_jax.evaluation.benchmarks.nextqa import NextQa, chosen_letter
from prumerge_jax.evaluation.benchmarks.video_qa import ACTIVITYNET_QA, MSVD_QA
from prumerge_jax.evaluation.questions import Task, TaskQuestions, video_file


def write(path: pathlib.Path, value: object) -> pathlib.Path:
    path.write_text(json.dumps(value))
    return path


@pytest.fixture
def files(tmp_path: pathlib.Path) -> pathlib.Path:
    asked = [("vid1", "what is played?", "q0"), ("vid1", "who plays?", "q1"), ("vid2", "why?", 7)]
    write(
        tmp_path / "test_q.json",
        [{"video_name": v, "question": q, "question_id": n} for v, q, n in asked],
    )
    truths = zip(("guitar", "a man", "fun"), ("q0", "q1", 7), strict=True)
    write(tmp_path / "test_a.json", [{"answer": a, "type": 1, "question_id": n} for a, n in truths])
    return tmp_path


def answers(questions: list, *texts: str) -> Answers:
    rows = [MSVD_QA.answer_row(q, text) for q, text in zip(questions, texts, strict=True)]
    return Answers("answers", rows)


def test_answers_are_matched_exactly_and_go_to_the_judge(files: pathlib.Path) -> None:
    questions = MSVD_QA.read_questions(files / "test_q.json")
    assert [question.image for question in questions] == ["vid1", "vid1", "vid2"]
    annotations = MSVD_QA.read_annotations(files / "test_a.json")
    given = answers(questions, "Guitar.", "the woman", "For fun")
    assert MSVD_QA.score(questions, given, annotations) == {"exact_match": pytest.approx(100 / 3)}
    (path,) = MSVD_QA.upload(questions, given, annotations, files)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.name == "msvd_qa_pred.json"
    assert lines[2] == {"id": 7, "question": "why?", "answer": "fun", "pred": "For fun"}


def test_verdicts_of_the_judge_are_scored(files: pathlib.Path) -> None:
    questions = MSVD_QA.read_questions(files / "test_q.json")
    said = {"q0": ("yes", 5), "q1": ("No", 1.9), "7": ("yes.", 4)}
    judge = {key: [{"pred": p, "score": s}, {"q": "", "a": ""}] for key, (p, s) in said.items()}
    write(files / "judge.json", judge)
    annotations = MSVD_QA.read_annotations(files)
    scores = MSVD_QA.score(questions, answers(questions, "a", "b", "c"), annotations)
    assert scores["accuracy"] == pytest.approx(200 / 3)
    assert scores["points"] == pytest.approx(100 * (5 + 1 + 4) / 15)
    write(files / "judge.json", {"q0": [{"pred": "perhaps", "score": 3}]})
    with pytest.raises(ValueError, match="entry 'q0': pred is 'perhaps'; expected yes or no"):
        MSVD_QA.read_annotations(files)
    write(files / "judge.json", {"q0": [{"pred": "yes", "score": 3}]})
    with pytest.raises(ValueError, match="no verdict on question_id 'q1'; ask the judge about all"):
        MSVD_QA.score(questions, answers(questions, "", "", ""), MSVD_QA.read_annotations(files))
    write(files / "test_a.json", [{"answer": "guitar", "question_id": "q0"}])
    with pytest.raises(ValueError, match="the annotations have no answer to question_id 'q1'"):
        MSVD_QA.check(questions, MSVD_QA.read_annotations(files / "test_a.json"))


def test_videos_are_found_by_their_names(files: pathlib.Path) -> None:
    questions = ACTIVITYNET_QA.read_questions(files / "test_q.json")
    assert questions[0].image == "v_vid1"
    task = Task(ACTIVITYNET_QA, files / "test_q.json", files, files / "test_a.json")
    with pytest.raises(FileNotFoundError, match="none of the images .*, such as 'v_vid1'"):
        TaskQuestions(task).check_images()
    (files / "v_vid1.mkv").write_bytes(b"")
    TaskQuestions(task).check_images()
    assert video_file(files / "v_vid1") == files / "v_vid1.mkv"
    assert video_file(files / "v_vid2") == files / "v_vid2"


def test_next_qa_reads_its_table_and_takes_the_first_letter(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "test.csv"
    file.write_text(
        "video,frame_count,question,answer,qid,type,a0,a1,a2,a3,a4\n"
        '42,300,"why, then",3,6,CW,a,b,c,d,e\n42,300,what,0,7,TN,p,q,r,s,t\n'
    )
    benchmark = NextQa()
    questions = benchmark.read_questions(file)
    assert questions[0].image == "42"
    assert questions[0].text == (
        "why, then\nA. a\nB. b\nC. c\nD. d\nE. e\n"
        "Answer with the option's letter from the given choices directly."
    )
    given = Answers(
        "answers",
        [benchmark.answer_row(q, t) for q, t in zip(questions, ("D. d", "(B)"), strict=True)],
    )
    assert benchmark.score(questions, given, None) == {
        "accuracy": 50, "accuracy_causal": 100, "accuracy_temporal": 0,
    }  # fmt: skip
    letters = [chosen_letter(text) for text in ("C", " e", "(A) x", "Bob", "none", "B: so")]
    assert letters == ["C", None, "A", None, None, "B"]
    file.write_text(file.read_text().replace(",3,6", ",5,6"))
    with pytest.raises(ValueError, match="line 2: answer is '5'; expected 0 to 4"):
        benchmark.read_questions(file)
