import json

import pytest

from prumerge_jax.evaluation.answers import Answers, read_answers
from prumerge_jax.evaluation.benchmarks.base import Question
from prumerge_jax.evaluation.benchmarks.llava_bench import (
    Annotations,
    LlavaBench,
    Review,
    parse_review,
    relative_score,
)

BENCH = LlavaBench()


@pytest.mark.parametrize(
    ("content", "grades"),
    [
        ("8 10\nBoth", (8, 10)),
        ("9 6.5", (9, 6.5)),
        ("8,10", (8, 10)),
        ("8, 10", (-1, -1)),
        ("8  10", (-1, -1)),
        ("8 10 ", (-1, -1)),
        ("eight ten", (-1, -1)),
        ("\n8 10", (-1, -1)),
    ],
)
def test_first_line_of_a_review(content: str, grades: tuple[float, float]) -> None:
    assert parse_review(content) == grades


def test_means_are_rounded_before_they_are_divided() -> None:
    assert round(0.32352 / 0.5 * 100, 1) == 64.7
    assert relative_score([Review(0, "x", "c", 0.5, 0.32352)]) == 64.8


def official(golden, size: str):
    folder = golden / "llava_bench"
    rows = [json.loads(line) for line in (folder / "questions_rebuilt.jsonl").open()]
    questions = [
        Question(row["question_id"], f"{row['question_id']:03}.jpg", row["text"]) for row in rows
    ]
    return folder, questions, read_answers(folder / f"answers_llava-v1.5-{size}.jsonl")


@pytest.mark.parametrize(
    ("size", "scores", "reference", "model"),
    [
        ("13b", (72.8, 72.7, 72.1), (86.5, 86.5, 86.8), (63.0, 62.9, 62.6)),
        ("7b", (64.7, 65.3, 66.3), (87.0, 87.0, 86.7), (56.3, 56.8, 57.5)),
    ],
)
def test_official_reviews(golden, size: str, scores, reference, model) -> None:
    folder, questions, answers = official(golden, size)
    # Reviews of both models are in the folder; each belongs to the answers whose ids it names.
    annotations = Annotations(
        {
            file.stem: review
            for file in sorted((folder / "reviews").glob("*.jsonl"))
            for review in [BENCH.read_annotations(file).reviews[file.stem]]
        },
        None,
    )
    assert len(annotations.reviews) == 6
    metrics = BENCH.score(questions, answers, annotations)
    names = [f"llava-v1.5-{size}-eval{i}" for i in (1, 2, 3)]
    assert [metrics[f"score_{name}"] for name in names] == list(scores)
    assert metrics["score"] == pytest.approx(sum(scores) / 3)
    assert metrics["reference"] == pytest.approx(sum(reference) / 3, abs=0.06)
    assert metrics["model"] == pytest.approx(sum(model) / 3, abs=0.06)
    for i, name in enumerate(names):
        alone = Annotations({name: annotations.reviews[name]}, None)
        only = BENCH.score(questions, answers, alone)
        assert round(only["reference"], 1) == reference[i]
        assert round(only["model"], 1) == model[i]
    assert {"score_conv", "score_detail", "score_complex"} <= metrics.keys()
    values = BENCH.per_question(questions, answers, annotations)["model"]
    assert values.shape == (60,)
    assert 100 * values.mean() == pytest.approx(metrics["model"], abs=0.01)


def test_official_reviews_parse(golden) -> None:
    rows = [
        json.loads(line)
        for file in (golden / "llava_bench" / "reviews").glob("*.jsonl")
        for line in file.open()
    ]
    equal = [parse_review(row["content"]) == tuple(row["tuple"]) for row in rows]
    assert (sum(equal), len(equal)) == (360, 360)


def review_row(number: int, answer_id: str, grades=(8.0, 6.0)) -> dict:
    return {
        "question_id": number,
        "answer2_id": answer_id,
        "category": "llava_bench_conv",
        "tuple": list(grades),
    }


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def two_answers():
    questions = [Question(i, f"{i}.jpg", f"What {i}?", {"category": "conv"}) for i in (0, 1)]
    rows = [BENCH.answer_row(question, "Text") for question in questions]
    return questions, Answers("a", [row | {"answer_id": f"id{i}"} for i, row in enumerate(rows)])


def test_reviews_of_other_answers_are_left_out_or_refused(tmp_path, two_answers) -> None:
    questions, answers = two_answers
    path = tmp_path / "review.jsonl"
    write_rows(path, [review_row(0, "other0"), review_row(1, "other1")])
    assert BENCH.score(questions, answers, BENCH.read_annotations(path)) == {}
    write_rows(path, [review_row(0, "id0"), review_row(1, "other1")])
    with pytest.raises(ValueError, match="review: 1 of 2 reviews are of the 2 answers"):
        BENCH.score(questions, answers, BENCH.read_annotations(path))
    write_rows(path, [review_row(0, "id0"), review_row(1, "id1", (10.0, 5.0))])
    metrics = BENCH.score(questions, answers, BENCH.read_annotations(path))
    assert (metrics["score"], metrics["score_conv"]) == (61.1, 61.1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (review_row(0, "id0"), "row 2 reviews question_id 0 again"),
        (review_row(1, "id1", (-1.0, -1.0)), "row 2 has no two grades"),
        (review_row(1, "id1", (5.0,)), "row 2 has no two grades"),
    ],
)
def test_bad_reviews_are_named(tmp_path, row, message: str) -> None:
    path = write_rows(tmp_path / "review.jsonl", [review_row(0, "id0"), row])
    with pytest.raises(ValueError, match=message):
        BENCH.read_annotations(path)


def test_judge_requests(tmp_path, two_answers) -> None:
    questions, answers = two_answers
    folder = tmp_path / "release"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"neither reviews/\*.jsonl nor context.jsonl"):
        BENCH.read_annotations(folder)
    write_rows(
        folder / "context.jsonl",
        [{"image": "0.jpg", "caption": ["One.", "Two."]}, {"image": "1.jpg", "caption": "Three."}],
    )
    references = [{"question_id": i, "text": f"Ref {i}", "answer_id": f"ref{i}"} for i in (0, 1)]
    write_rows(folder / "answers_gpt4.jsonl", references)
    rule = {"role": "Assistant", "prompt": "Judge them."}
    (folder / "rule.json").write_text(json.dumps({"llava_bench_conv": rule}))
    annotations = BENCH.read_annotations(folder)
    assert BENCH.score(questions, answers, annotations) == {}
    (path,) = BENCH.upload(questions, answers, annotations, tmp_path)
    first, second = (json.loads(line) for line in path.open())
    assert first["messages"][1]["content"] == (
        "[Context]\nOne.\nTwo.\n\n[Question]\nWhat 0?\n\n"
        "[Assistant 1]\nRef 0\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nText\n\n[End of Assistant 2]\n\n"
        "[System]\nJudge them.\n\n"
    )
    assert (first["model"], first["temperature"]) == ("gpt-4-0314", 0.2)
    assert (second["answer1_id"], second["answer2_id"]) == ("ref1", "id1")
    (folder / "rule.json").write_text("{}")
    with pytest.raises(ValueError, match="question_id 0: no rule llava_bench_conv in rule.json"):
        BENCH.upload(questions, answers, BENCH.read_annotations(folder), tmp_path)


def test_official_rules_cover_the_categories(golden) -> None:
    rules = json.loads((golden / "llava_bench" / "rule.json").read_text())
    for category in ("conv", "detail", "complex"):
        assert {"role", "prompt"} <= rules[f"llava_bench_{category}"].keys()
