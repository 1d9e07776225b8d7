"""The miniature benchmark's files and scorer."""

import collections
import pathlib

import numpy as np
import pytest
from PIL import Image

from prumerge_jax.digits import benchmark
from prumerge_jax.digits import questions as digits_questions
from prumerge_jax.evaluation.answers import Answers

SCENES = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("digits") / "test"
    benchmark.write_files(folder, scenes=SCENES, seed=5)
    return folder


@pytest.fixture(scope="module")
def questions(folder):
    return benchmark.Digits().read_questions(folder / benchmark.QUESTIONS_FILE)


@pytest.fixture(scope="module")
def truths(folder):
    return benchmark.Digits().read_annotations(folder / benchmark.ANNOTATIONS_FILE)


def _answers(questions, texts) -> Answers:
    rows = [
        {"question_id": question.question_id, "prompt": question.text, "text": text}
        for question, text in zip(questions, texts, strict=True)
    ]
    return Answers("answers.jsonl", rows)


def test_the_files_hold_the_scenes_and_questions_of_the_data_set(folder, questions, truths) -> None:
    expected = []
    for index in range(SCENES):
        scene, asked = digits_questions.draw_with_questions("test", index, seed=5)
        with Image.open(folder / benchmark.IMAGE_FOLDER / f"{scene.id}.png") as image:
            assert np.array_equal(image, scene.image)
        for question in asked:
            expected.append((f"{scene.id}.png", question.text, question.family))
            key = f"{scene.id}_{question.family}"
            assert truths[key] == (question.answer, scene.places, scene.digits)
    read = [(question.image, question.text, question.extra["category"]) for question in questions]
    assert read == expected
    assert list(truths) == [question.question_id for question in questions]


def test_right_answers_score_100_and_unreadable_ones_what_pope_gives(questions, truths) -> None:
    scorer = benchmark.Digits()
    right = [truths[question.question_id].answer for question in questions]
    metrics = scorer.score(questions, _answers(questions, right), truths)
    for name in (*digits_questions.FAMILIES, "mean"):
        assert metrics[f"accuracy_{name}"] == 100
        assert metrics[f"standard_error_{name}"] == 0
    # An empty answer is a yes to POPE, and wrong everywhere else.
    metrics = scorer.score(questions, _answers(questions, [""] * len(questions)), truths)
    share_of_yes = np.mean(
        [truths[q.question_id].answer == "yes" for q in questions if "presence" in q.question_id]
    )
    assert metrics["accuracy_presence"] == pytest.approx(100 * share_of_yes)
    assert metrics["accuracy_mean"] == pytest.approx(metrics["accuracy_presence"] / 4)


@pytest.mark.parametrize(
    ("family", "template"),
    [
        ("read", " {}. "),
        ("presence", "north 3 7 no, south 7 7 yes. {}"),
        ("presence", "{}, there is"),
        ("presence", "{}. The north is not empty."),
        ("count", "northwest. {}"),
        ("count", "{}."),
        ("compare", "north 7, south 3. {}"),
        ("compare", "{}. north"),
        ("compare", "north 7, south 3. The answer is {}."),
    ],
)
def test_answers_are_read_as_by_the_mirrored_benchmark(questions, truths, family, template) -> None:
    texts = [template.format(truths[question.question_id].answer) for question in questions]
    metrics = benchmark.Digits().score(questions, _answers(questions, texts), truths)
    assert metrics[f"accuracy_{family}"] == 100


def test_the_standard_error_is_that_of_a_proportion(questions, truths) -> None:
    counts = collections.Counter(question.extra["category"] for question in questions)
    texts, wrong = [], collections.Counter()
    for question in questions:
        family = question.extra["category"]
        fails = wrong[family] < counts[family] // 4
        wrong[family] += fails
        answer = truths[question.question_id].answer
        texts.append({"yes": "no", "no": "yes"}.get(answer, "?") if fails else answer)
    metrics = benchmark.Digits().score(questions, _answers(questions, texts), truths)
    variances = []
    for family, count in counts.items():
        p = 1 - (count // 4) / count
        variances.append(p * (1 - p) / count)
        assert metrics[f"accuracy_{family}"] == pytest.approx(100 * p)
        assert metrics[f"standard_error_{family}"] == pytest.approx(100 * variances[-1] ** 0.5)
    assert metrics["standard_error_mean"] == pytest.approx(100 * sum(variances) ** 0.5 / 4)


def test_files_that_do_not_belong_together_are_refused(questions, truths, tmp_path) -> None:
    answers = _answers(questions, ["3"] * len(questions))
    some = dict(list(truths.items())[1:])
    with pytest.raises(ValueError, match=f"{questions[0].question_id}.*written together"):
        benchmark.Digits().score(questions, answers, some)
    with pytest.raises(ValueError, match="unknown split 'dev'.*validation"):
        benchmark.write_files(tmp_path, split="dev", scenes=1)
