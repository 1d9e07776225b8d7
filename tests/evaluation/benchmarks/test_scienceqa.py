import gzip
import json

import pytest

from prumerge_jax.evaluation.answers import Answers, read_answers
from prumerge_jax.evaluation.benchmarks.scienceqa import Key, ScienceQa, choice_index, parse_letter

SCIENCEQA = ScienceQa()


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("F", None),
        ("b", None),
        ("", None),
        ("AB", None),
        ("B.", None),
        ("C. a cat", "C"),
        ("F. a cat", None),
        ("C.a cat", None),
        ("The answer is D.", "D"),
        ("The answer is F. or so", "F"),
        ("The answer is A. The answer is A.", None),
        ("So the answer is A.", None),
    ],
)
def test_letters(text: str, letter: str | None) -> None:
    assert parse_letter(text) == letter


def test_a_letter_beyond_the_choices_is_invalid() -> None:
    assert [choice_index("C", n) for n in (2, 3, 5)] == [-1, 2, 2]
    assert choice_index("The answer is Z.", 5) == -1


def entry(name: str, image: bool) -> dict:
    value = "<image>\nWhich?\nA. x\nB. y" if image else "Which?\nA. x\nB. y"
    return {
        "id": name,
        **({"image": f"{name}/image.png"} if image else {}),
        "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "A"}],
    }


@pytest.fixture
def data_set(tmp_path):
    problems = {name: {"choices": ["x", "y"], "answer": 0} for name in ("4", "5", "6", "7")}
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    (tmp_path / "pid_splits.json").write_text(json.dumps({"test": ["4", "5", "6"], "val": ["7"]}))
    (tmp_path / "questions.json").write_text(
        json.dumps([entry("4", False), entry("5", True), entry("6", True)])
    )
    return tmp_path


def test_prompts_and_image_accuracy(data_set) -> None:
    questions = SCIENCEQA.read_questions(data_set / "questions.json")
    asked = "Which?\nA. x\nB. y\nAnswer with the option's letter from the given choices directly."
    assert [question.text for question in questions] == [asked] * 3
    assert [question.image for question in questions] == [None, "5/image.png", "6/image.png"]
    rows = [SCIENCEQA.answer_row(question, "A") for question in questions]
    assert [row["prompt"] for row in rows] == [asked, f"<image>\n{asked}", f"<image>\n{asked}"]
    keys = SCIENCEQA.read_annotations(data_set)
    assert keys == {"4": Key(0, 2), "5": Key(0, 2), "6": Key(0, 2)}
    rows[1]["text"] = "E"
    metrics = SCIENCEQA.score(questions, Answers("a", rows), keys)
    assert metrics == pytest.approx(
        {"accuracy": 200 / 3, "accuracy_image": 50, "unanswered": 0, "unparsed": 0}
    )


def test_a_missing_answer_is_wrong_and_no_image_question(data_set) -> None:
    questions = SCIENCEQA.read_questions(data_set / "questions.json")
    keys = SCIENCEQA.read_annotations(data_set)
    rows = [SCIENCEQA.answer_row(question, "A") for question in questions[:2]]
    metrics = SCIENCEQA.score(questions, Answers("a", rows), keys)
    assert metrics == pytest.approx(
        {"accuracy": 200 / 3, "accuracy_image": 100, "unanswered": 1, "unparsed": 0}
    )


def test_integer_ids_are_refused(data_set) -> None:
    questions = SCIENCEQA.read_questions(data_set / "questions.json")
    row = SCIENCEQA.answer_row(questions[0], "A") | {"question_id": 4}
    with pytest.raises(ValueError, match="a.jsonl row 1: question_id 4 is not in the test split"):
        SCIENCEQA.score(questions, Answers("a.jsonl", [row]), SCIENCEQA.read_annotations(data_set))


def unpacked(source, folder):
    target = folder / source.name.removesuffix(".gz")
    target.write_bytes(gzip.decompress(source.read_bytes()))
    return target


def test_official_predictions(golden, tmp_path) -> None:
    folder = golden / "scienceqa"
    questions = SCIENCEQA.read_questions(unpacked(folder / "llava_test_CQM-A.json.gz", tmp_path))
    answers = read_answers(unpacked(folder / "answers_rebuilt_llava-v1.5-13b.jsonl.gz", tmp_path))
    result = json.loads(unpacked(folder / "llava-v1.5-13b_result.json.gz", tmp_path).read_bytes())

    # The official data set's files, with as many choices as the key says there are.
    unpacked(folder / "pid_splits.json.gz", tmp_path)
    answer_key = json.loads((folder / "answer_key.json").read_text())
    problems = {
        name: {"choices": [""] * key["n_choices"], "answer": key["answer"]}
        for name, key in answer_key.items()
    }
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    keys = SCIENCEQA.read_annotations(tmp_path)

    prompts = [SCIENCEQA.answer_row(question, "")["prompt"] for question in questions]
    assert prompts == [row["prompt"] for row in answers.rows]
    assert sum(question.image is not None for question in questions) == 2017
    ours = {
        row["question_id"]: choice_index(row["text"], keys[row["question_id"]].n_choices)
        for row in answers.rows
    }
    assert ours == result["results"]
    assert len(ours) == 4241
    assert sum(index == -1 for index in ours.values()) == 38

    right = SCIENCEQA.per_question(questions, answers, keys)
    assert (right["accuracy"].sum(), len(right["accuracy"])) == (3155, 4241)
    assert (right["accuracy_image"].sum(), len(right["accuracy_image"])) == (1445, 2017)
    assert SCIENCEQA.score(questions, answers, keys) == pytest.approx(
        {"accuracy": 74.392832, "accuracy_image": 71.641051, "unanswered": 0, "unparsed": 5},
        abs=1e-6,
    )
