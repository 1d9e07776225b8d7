import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prumerge_jax.evaluation import answers, jsonfiles

ROW = {"question_id": 7, "prompt": "What?\nAnswer.", "text": "A ligne \u2028 brisée"}


def test_round_trip_and_common_fields(tmp_path) -> None:
    row = answers.complete_row(ROW, index=0, fingerprint={"weights": "ab"}, model_id="tiny")
    path = tmp_path / "answers.jsonl"
    answers.write_answers(path, [row, row])
    read = answers.read_answers(path)
    assert list(read.rows) == [row, row]
    assert read.source == str(path)
    assert list(row) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert row["metadata"] == {}
    assert path.read_bytes().isascii()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["answers.jsonl"]


@given(st.integers(0, 10**6), st.text(max_size=5))
def test_answer_ids_look_like_shortuuids_and_are_reproducible(index: int, weights: str) -> None:
    name = answers.answer_id(index, {"weights": weights, "seed": 0})
    assert re.fullmatch(r"[2-9A-HJ-NP-Za-km-z]{22}", name)
    assert name == answers.answer_id(index, {"seed": 0, "weights": weights})
    assert name != answers.answer_id(index + 1, {"weights": weights, "seed": 0})
    assert name != answers.answer_id(index, {"weights": weights, "seed": 1})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question_id": 1, "prompt": "p", "te', "row 2: not valid JSON"),
        ("", "row 2 is blank"),
        ("[" * 100_000, "row 2: nested too deeply"),
        ('{"question_id": 1, "question_id": 2}', "row 2: not valid JSON: repeated keys"),
        ("[1]", "row 2 is not a JSON object"),
        ('{"question_id": 1, "prompt": "p"}', "row 2 has no field 'text'"),
        ('{"question_id": 1, "prompt": "p", "text": null}', "row 2: field 'text' must be str"),
        ('{"question_id": true, "prompt": "p", "text": ""}', "must be int or str, not True"),
    ],
)
def test_bad_lines_are_named(tmp_path, line: str, message: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        answers.read_answers(path)
    assert str(path) in str(error.value)


def test_nan_is_not_written() -> None:
    with pytest.raises(ValueError, match="JSON"):
        jsonfiles.dump_line({"score": float("nan")})


def test_failed_write_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "answers.jsonl"
    answers.write_answers(path, [ROW])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="JSON"):
        answers.write_answers(path, [ROW, {"x": float("inf")}])
    assert path.read_bytes() == before
