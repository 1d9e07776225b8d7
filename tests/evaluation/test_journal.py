import dataclasses
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prumerge_jax.evaluation import jsonfiles
from prumerge_jax.evaluation.answers import read_answers
from prumerge_jax.evaluation.journal import Journal, RowOutcome
from tests.evaluation import scoring_process
from tests.evaluation.scoring_process import FINGERPRINT, outcome

ROWS = 12
NAN = {"prompt": "p", "text": "t", "x": float("nan")}
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def results(folder: pathlib.Path) -> tuple[bytes, bytes]:
    return (folder / "answers.jsonl").read_bytes(), (folder / "errors.jsonl").read_bytes()


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> pathlib.Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("straight")
    scoring_process.score(folder, ROWS)
    return folder


def test_results_are_in_input_order(straight) -> None:
    answered = [index for index in range(ROWS) if index % 7 != 3]
    answers = read_answers(straight / "answers.jsonl")
    assert list(answers.rows) == [outcome(index).answer for index in answered]
    assert jsonfiles.read_jsonl(straight / "errors.jsonl") == [
        {"row": 4, "question_id": "q3", "error": "image 3 is missing"},
        {"row": 11, "question_id": "q10", "error": "image 10 is missing"},
    ]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_prefix_of_the_journal_resumes_to_the_same_bytes(straight, tmp_path, data) -> None:
    whole = (straight / "journal.jsonl").read_bytes()
    kept = data.draw(st.integers(0, len(whole)))
    path = tmp_path / "journal.jsonl"
    path.write_bytes(whole[:kept])
    complete_rows = max(whole[:kept].count(b"\n") - 1, 0)
    with Journal(path, FINGERPRINT, ROWS) as journal:
        assert len(journal.outcomes) == complete_rows
    scoring_process.score(tmp_path, ROWS)
    assert results(tmp_path) == results(straight)
    indices = [row["index"] for row in jsonfiles.read_jsonl(path)[1:]]
    answered = [index for index in indices if index % 7 != 3]
    assert sorted(answered) == [index for index in range(ROWS) if index % 7 != 3]


@pytest.mark.slow
def test_killed_runs_finish_with_the_bytes_of_an_uninterrupted_one(tmp_path) -> None:
    num_rows, generator = 300, random.Random(7)
    uninterrupted = tmp_path / "straight"
    uninterrupted.mkdir()
    scoring_process.score(uninterrupted, num_rows)
    command = [sys.executable, "-m", "tests.evaluation.scoring_process", str(tmp_path), "300"]
    reached = 0
    for _ in range(5):
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(generator.randint(1, 12)):
            line = process.stdout.readline()
        time.sleep(generator.uniform(0, 0.003))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert int(line) >= reached  # it resumed (failed rows first) and did not start over
        reached = int(line)
        assert not (tmp_path / "answers.jsonl").exists()
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    assert results(tmp_path) == results(uninterrupted)
    rows = jsonfiles.read_jsonl(tmp_path / "journal.jsonl")[1:]
    answered = [row["index"] for row in rows if row["answer"] is not None]
    assert len(answered) == len(set(answered))


def test_answered_rows_are_skipped_and_failed_ones_tried_again(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, FINGERPRINT, 3) as journal:
        assert journal.unanswered == [0, 1, 2]
        journal.append([RowOutcome(0, "q0", error="no image"), outcome(2)])
        assert journal.unanswered == [0, 1]
        with pytest.raises(ValueError, match="1 of 3 rows are not scored yet, the first is row 2"):
            journal.write_results(tmp_path)
        journal.append([outcome(1)])
        journal.write_results(tmp_path)
    assert (tmp_path / "errors.jsonl").read_text().count("no image") == 1
    with Journal(path, FINGERPRINT, 3) as journal:
        assert journal.unanswered == [0]
        assert journal.outcomes[2] == outcome(2)
        journal.append([outcome(0)])
        assert journal.unanswered == []
        journal.write_results(tmp_path)
    assert (tmp_path / "errors.jsonl").read_bytes() == b""
    assert len(jsonfiles.read_jsonl(tmp_path / "answers.jsonl")) == 3


def test_nothing_is_scored_twice_and_bad_batches_leave_no_trace(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, FINGERPRINT, 3) as journal:
        journal.append([outcome(0)])
        before = path.read_bytes()
        for batch, message in (
            ([outcome(1), outcome(0)], "row 1 has an answer already"),
            ([outcome(1), outcome(1)], "row 2 is twice in one batch"),
            ([outcome(5)], "row index 5 of 3 rows"),
            ([dataclasses.replace(outcome(1), answer=NAN)], "JSON"),
        ):
            with pytest.raises(ValueError, match=message):
                journal.append(batch)
        assert path.read_bytes() == before
        assert journal.unanswered == [1, 2]


def test_an_outcome_is_an_answer_or_an_error() -> None:
    with pytest.raises(ValueError, match="row 1 needs either an answer or an error"):
        RowOutcome(0, "q0")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"reduction": "full"}, "reduction was 'prumerge+' and is 'full'"),
        ({"seed": 1}, "seed was 'absent' and is 1"),
        ({"weights": "x", "temperature": 1}, "temperature was 0.0 and is 1; weights was 'ab12'"),
    ],
)
def test_another_fingerprint_is_refused_by_name(straight, tmp_path, change, difference) -> None:
    path = tmp_path / "journal.jsonl"
    torn = (straight / "journal.jsonl").read_bytes()[:-3]
    path.write_bytes(torn)
    with pytest.raises(ValueError, match=re.escape(difference)) as error:
        Journal(path, FINGERPRINT | change, ROWS)
    unchanged = FINGERPRINT.keys() - change.keys()
    assert str(path) in str(error.value)
    assert not any(name in str(error.value).replace(str(path), "") for name in unchanged)
    assert path.read_bytes() == torn


def test_two_writers_are_refused_until_the_first_is_gone(tmp_path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path, FINGERPRINT, 2) as journal:
        with pytest.raises(RuntimeError, match="journal.jsonl is being written by another run"):
            Journal(path, FINGERPRINT, 2)
        command = [sys.executable, "-m", "tests.evaluation.scoring_process", str(tmp_path), "2"]
        other = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        assert other.returncode != 0
        assert "is being written by another run" in other.stderr
        journal.append([outcome(0), outcome(1)])
    with Journal(path, FINGERPRINT, 2) as journal:
        assert journal.unanswered == []


def resumed(path: pathlib.Path, data: bytes) -> dict[int, RowOutcome]:
    """What a journal of these bytes is taken to hold."""
    path.write_bytes(data)
    with Journal(path, FINGERPRINT, ROWS) as journal:
        return dict(journal.outcomes)


def rows_at(data: bytes, *places: int) -> set[int]:
    """The rows whose lines hold these bytes."""
    lines = data[: data.rfind(b"\n") + 1].split(b"\n")
    numbers = {data[:place].count(b"\n") for place in places}
    return {json.loads(lines[number])["index"] for number in numbers if 0 < number < len(lines) - 1}


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_drops_its_own_row_and_changes_no_answer(
    straight, tmp_path, capsys, data
) -> None:
    whole = (straight / "journal.jsonl").read_bytes()
    bit = data.draw(st.integers(0, 8 * len(whole) - 1))
    place = bit // 8
    flipped = bytearray(whole)
    flipped[place] ^= 1 << bit % 8
    capsys.readouterr()
    outcomes = resumed(tmp_path / "journal.jsonl", bytes(flipped))
    # A newline that is lost damages the lines on both of its sides.
    damaged = rows_at(whole, place, place + 1 if whole[place] == ord("\n") else place)
    intact = resumed(tmp_path / "intact.jsonl", whole)
    assert outcomes == {index: row for index, row in intact.items() if index not in damaged}
    said = capsys.readouterr().err.splitlines()
    number = whole[:place].count(b"\n") + 1
    assert f"{tmp_path / 'journal.jsonl'} line {number} is " in said[0]
    assert all("is scored again" in line for line in said)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_journal_is_completed_to_the_same_bytes(straight, tmp_path, data) -> None:
    path = tmp_path / "journal.jsonl"
    damaged = bytearray((straight / "journal.jsonl").read_bytes())
    bit = data.draw(st.integers(0, 8 * len(damaged) - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(damaged[: data.draw(st.integers(len(damaged) // 2, len(damaged)))]))
    scoring_process.score(tmp_path, ROWS)
    assert results(tmp_path) == results(straight)


@pytest.mark.parametrize(
    ("damage", "lost", "said"),
    [
        (lambda lines: [lines[0], b"\0" * 20, *lines[2:]], {11}, "line 2 is damaged"),
        (lambda lines: [lines[0], b"", b" ", *lines[1:]], set(), ""),
        (lambda lines: [*lines, b"\0" * 512], set(), "line 14 is damaged"),
        (lambda lines: [*lines[:2], lines[1], *lines[2:]], set(), "line 3 is not used: row 12 has"),
        (lambda lines: [lines[0], b'{"index": 0}', *lines[2:]], {11}, "line 2 is damaged"),
        (
            lambda lines: [lines[0], lines[1].replace(b'"index": 11', b'"index": 5'), *lines[2:]],
            {11},
            "line 2 is damaged, or was edited",
        ),
        (
            lambda lines: [*lines[:2], lines[2].replace(b"image 10", b"image 12"), *lines[3:]],
            {10},
            "line 3 is damaged, or was edited",
        ),
        (lambda lines: lines[1:], {11}, "line 1 is damaged"),
    ],
)
def test_damage_is_named_and_costs_its_row(
    straight, tmp_path, capsys, damage, lost: set[int], said: str
) -> None:
    lines = (straight / "journal.jsonl").read_bytes().splitlines()
    outcomes = resumed(tmp_path / "journal.jsonl", b"\n".join(damage(lines)) + b"\n")
    assert set(range(ROWS)) - outcomes.keys() == lost
    heard = capsys.readouterr().err
    assert said in heard
    assert bool(said) == bool(heard)


@pytest.mark.parametrize(
    "content",
    [
        b'{"question_id": 1, "text": "not a journal"}\n',
        b'{"fingerprint": {"weights": "ab12", "reduction": "prumerge+", "temperature": 0.0}}\n'
        b'{"index": 0, "question_id": "q0", "answer": null, "error": "no", "measured": {}}\n',
    ],
)
def test_a_foreign_file_or_one_without_checksums_is_refused_and_left(tmp_path, content) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match="not a scoring journal of this run.*another workdir"
    ) as error:
        Journal(path, FINGERPRINT, ROWS)
    assert str(path) in str(error.value)
    assert path.read_bytes() == content


def test_rows_of_another_run_are_not_taken_over(straight, tmp_path, capsys) -> None:
    """Even when their header is gone: a row's checksum continues that of its run."""
    path = tmp_path / "journal.jsonl"
    other = FINGERPRINT | {"weights": "cd34"}
    lines = (straight / "journal.jsonl").read_bytes().splitlines(keepends=True)
    with Journal(path, other, ROWS) as journal:
        journal.append([outcome(0)])
    path.write_bytes(path.read_bytes() + b"".join(lines[1:]))
    with Journal(path, other, ROWS) as journal:
        assert journal.outcomes.keys() == {0}
    assert len(capsys.readouterr().err.splitlines()) == ROWS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": 1.5}, "row index 1.5 is not an integer"),
        ({"index": True}, "row index True is not an integer"),
        ({"question_id": None}, "question_id"),
        ({"answer": {}}, "row 1, answer has no field 'prompt'"),
        ({"answer": {"prompt": "p", "text": 3}}, "field 'text' must be str"),
        ({"measured": {"visual_tokens": float("nan")}}, "measured visual_tokens is nan"),
        ({"measured": {"visual_tokens": "9"}}, "must be int or float"),
        ({"measured": []}, "field 'measured' must be dict"),
    ],
)
def test_outcomes_are_of_the_right_types(change, message: str) -> None:
    fields = dataclasses.asdict(outcome(0)) | change
    with pytest.raises(ValueError, match=re.escape(message)):
        RowOutcome(**fields)


def test_a_failed_write_leaves_no_part_of_a_line(tmp_path, monkeypatch) -> None:
    path = tmp_path / "journal.jsonl"
    real_write = os.write
    with Journal(path, FINGERPRINT, 3) as journal:
        journal.append([outcome(0)])
        before = path.read_bytes()

        def disk_full(descriptor: int, data: bytes) -> int:
            if len(data) > 10:
                return real_write(descriptor, data[:10])
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", disk_full)
        with pytest.raises(OSError, match="No space left on device: .*journal.jsonl"):
            journal.append([outcome(1)])
        monkeypatch.undo()
        assert path.read_bytes() == before
        journal.append([outcome(1)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["index"] for row in rows[1:]] == [0, 1]
