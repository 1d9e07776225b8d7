import json

import pytest

from prumerge_jax.evaluation.answers import Answers
from prumerge_jax.evaluation.benchmarks.base import Question
from prumerge_jax.evaluation.benchmarks.mme import SUITES, Mme, parse

MME = Mme()
INSTRUCTION = "\nAnswer the question using a single word or phrase."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Yes", "yes"),
        ("NO", "no"),
        ("Yes, there is no", "yes"),
        ("None", "no"),
        ("A yes", "other"),
        (" yes", "yes"),
        ("It is not", "other"),
        ("", "other"),
    ],
)
def test_first_four_characters_decide(text: str, expected: str) -> None:
    assert parse(text) == expected


@pytest.fixture
def release(tmp_path):
    """Two subtasks: one with files next to the images, one in the split layout, two spaces once."""
    flat, split = tmp_path / "count", tmp_path / "posters" / "questions_answers_YN"
    flat.mkdir()
    split.mkdir(parents=True)
    (tmp_path / "posters" / "images").mkdir()
    (flat / "0001.txt").write_text(
        "Is there one? Please answer yes or no.\tYes\n"
        "Are there two?  Please answer yes or no.\tNo\n"
    )
    for name in ("tt1", "tt2"):
        (split / f"{name}.txt").write_text(
            f"Is it {name}? Please answer yes or no.\tYes\n"
            "Is it another? Please answer yes or no.\tNo"
        )
    return tmp_path


ASKED = [
    ("count/0001.jpg", "Is there one?"),
    ("count/0001.jpg", "Are there two?"),
    ("posters/images/tt1.jpg", "Is it tt1?"),
    ("posters/images/tt1.jpg", "Is it another?"),
    ("posters/images/tt2.jpg", "Is it tt2?"),
    ("posters/images/tt2.jpg", "Is it another?"),
]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "llava_mme.jsonl"
    path.write_text(
        "".join(
            json.dumps({"question_id": image, "image": image, "text": text + INSTRUCTION}) + "\n"
            for image, text in ASKED
        )
    )
    return MME.read_questions(path)


def answered(questions, texts) -> Answers:
    return Answers("a", [MME.answer_row(*pair) for pair in zip(questions, texts, strict=True)])


TEXTS = ["Yes", "no.", "Yes", "Yes", "I\tthink\nso", "No"]


def test_accuracy_and_accuracy_plus(release, questions) -> None:
    truth = MME.read_annotations(release)
    metrics = MME.score(questions, answered(questions, TEXTS), truth)
    assert metrics == pytest.approx(
        {
            "accuracy_count": 100,
            "accuracy_plus_count": 100,
            "score_count": 200,
            "accuracy_posters": 50,
            "accuracy_plus_posters": 0,
            "score_posters": 50,
            "unparsed": 1,
        }
    )
    values = MME.per_question(questions, answered(questions, TEXTS), truth)
    assert values["accuracy_posters"].tolist() == [1, 0, 0, 1]


def test_perception_sums_ten_subtasks() -> None:
    assert [len(subtasks) for subtasks in SUITES.values()] == [10, 4]
    rows, truth = [], {}
    for subtask in SUITES["perception"]:
        for question, right in (("a?", "Yes"), ("b?", "No")):
            truth[subtask, "1.txt", f"{question} Please answer yes or no."] = right
            prompt = question + INSTRUCTION
            rows.append({"question_id": f"{subtask}/1.jpg", "prompt": prompt, "text": "Yes"})
    questions = [Question(row["question_id"], "1.jpg", row["prompt"]) for row in rows]
    metrics = MME.score(questions, Answers("a", rows), truth)
    assert metrics["perception"] == pytest.approx(10 * 50)
    assert "cognition" not in metrics


def test_files_for_the_official_tool(release, questions, tmp_path) -> None:
    truth = MME.read_annotations(release)
    paths = MME.upload(questions, answered(questions, TEXTS), truth, tmp_path)
    assert [path.name for path in paths] == ["count.txt", "posters.txt"]
    assert paths[0].read_text() == (
        "0001.txt\tIs there one? Please answer yes or no.\tYes\tYes\n"
        "0001.txt\tAre there two?  Please answer yes or no.\tNo\tno.\n"
    )
    lines = paths[1].read_text().splitlines()
    assert lines[2] == "tt2.txt\tIs it tt2? Please answer yes or no.\tYes\tI think so"


def test_altered_prompts_and_half_asked_images_are_refused(release, questions) -> None:
    truth = MME.read_annotations(release)
    half = questions[:3]
    with pytest.raises(ValueError, match="1 questions about tt1.txt of posters instead of 2"):
        MME.score(half, answered(half, TEXTS[:3]), truth)
    del truth["count", "0001.txt", "Is there one? Please answer yes or no."]
    with pytest.raises(ValueError, match=r"no question 'Is there one\? .* for 0001.txt of count"):
        MME.score(questions, answered(questions, TEXTS), truth)


def test_bad_release_files_are_named(release) -> None:
    (release / "count" / "0001.txt").write_text("Is there one?\tYes\nNo truth here\n")
    with pytest.raises(ValueError, match="0001.txt line 2 is not a question, tab, Yes or No"):
        MME.read_annotations(release)
