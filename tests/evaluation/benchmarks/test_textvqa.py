import json

import pytest

from prumerge_jax.evaluation.answers import Answers, read_answers
from prumerge_jax.evaluation.benchmarks.textvqa import TextVqa, question_of_prompt

TEXTVQA = TextVqa()
INSTRUCTION = "Answer the question using a single word or phrase."


@pytest.mark.parametrize(
    "prompt",
    [
        f"What Brand?\nReference OCR token: A, B\n{INSTRUCTION}",
        f"What Brand?\nReference OCR token: \n{INSTRUCTION}",
        f"Reference OCR token: A\nWhat Brand?\n{INSTRUCTION}",
        f"What Brand?\n{INSTRUCTION}",
    ],
)
def test_question_of_prompt(prompt: str) -> None:
    assert question_of_prompt(prompt) == "what brand?"


@pytest.mark.parametrize("prompt", ["What brand?", "a\nb\nc", "a\nReference OCR token: A\nb\nc"])
def test_other_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="no TextVQA prompt"):
        question_of_prompt(prompt)


def annotation_file(tmp_path, data):
    path = tmp_path / "TextVQA_0.5.1_val.json"
    path.write_text(json.dumps({"data": data}))
    return path


def test_two_questions_about_one_image(tmp_path) -> None:
    humans = ["nokia"] * 2 + ["Sony"] * 8
    data = [
        {"image_id": "ab", "question": "What Brand?", "answers": humans},
        {"image_id": "ab", "question": "What number?", "answers": ["Ten"] * 10},
    ]
    truth = TEXTVQA.read_annotations(annotation_file(tmp_path, data))
    path = tmp_path / "questions.jsonl"
    path.write_text(
        "".join(
            json.dumps({"question_id": "ab", "image": "ab.jpg", "text": f"{text}\n{INSTRUCTION}"})
            + "\n"
            for text in ("What brand?", "What number?")
        )
    )
    questions = TEXTVQA.read_questions(path)
    rows = [
        TEXTVQA.answer_row(question, text)
        for question, text in zip(questions, ["Nokia.", "10"], strict=True)
    ]
    answers = Answers("a", rows[::-1])
    # Two of ten agree: those two see one other, the eight see two.
    values = TEXTVQA.per_question(questions, answers, truth)["accuracy"]
    assert values == pytest.approx([(2 * 1 / 3 + 8 * 2 / 3) / 10, 1.0])
    assert TEXTVQA.score(questions, answers, truth) == pytest.approx({"accuracy": 80})
    with pytest.raises(ValueError, match="no annotation for image and question"):
        TEXTVQA.score(questions, answers, {})


def test_annotations_need_ten_humans(tmp_path) -> None:
    data = [{"image_id": "ab", "question": "What?", "answers": ["x"] * 9}]
    with pytest.raises(ValueError, match="data entry 1 has 9 human answers"):
        TEXTVQA.read_annotations(annotation_file(tmp_path, data))


def test_official_predictions_fit_their_questions(golden) -> None:
    folder = golden / "textvqa"
    questions = TEXTVQA.read_questions(folder / "llava_textvqa_val_v051_ocr.first1000.jsonl")
    answers = read_answers(folder / "answers_llava-v1.5-13b.first1000.jsonl")
    expected = [
        json.loads(line) for line in (folder / "normalised_expected.first1000.jsonl").open()
    ]
    # Humans who all say what the expected file says agree with every answer.
    truth = {(row["question_id"], row["question"]): [row["answer"]] * 10 for row in expected}
    values = TEXTVQA.per_question(questions, answers, truth)["accuracy"]
    assert (values.sum(), len(values)) == (1000, 1000)
    prompts = [TEXTVQA.answer_row(question, "")["prompt"] for question in questions]
    assert prompts == [row["prompt"] for row in answers.rows]
