"""A complete scoring run on a tiny model: complete, resumable, indifferent to bad rows."""

import dataclasses
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from prumerge_jax.digits import benchmark as digits
from prumerge_jax.digits.questions import FAMILIES, conclusion
from prumerge_jax.engine.shapes import EngineConfig
from prumerge_jax.evaluation import runner
from prumerge_jax.evaluation.benchmarks.pope import says_yes
from prumerge_jax.evaluation.config import Decoding
from prumerge_jax.evaluation.questions import Task, TaskQuestions
from prumerge_jax.llava import Llava
from prumerge_jax.reductions import parse
from prumerge_jax.store.manifest import weights_identity
from tests.tiny_llava import write_tiny_llava

ENGINE = EngineConfig(
    batch_size=4,
    window_size=8,
    row_length=256,
    prefill_rows=2,
    slots=4,
    cache_length=256,
    decode_steps_per_call=4,
)
SCENES = 6
DECODING = Decoding(max_new_tokens=3)

# What the killed process runs: the same run as `answer` below, from the same arguments.
SCRIPT = """
import pathlib, sys
from tests.evaluation.test_runner import answer
answer(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[3]))
"""


def answer(
    model: pathlib.Path,
    data: pathlib.Path,
    workdir: pathlib.Path,
    reduction: str = "prumerge",
    engine: EngineConfig = ENGINE,
) -> runner.RunScores:
    workdir.mkdir(exist_ok=True)
    llava = Llava.load(model, engine=engine)
    chosen = parse(reduction)
    fingerprint = runner.fingerprint(
        weights_identity(model), str(llava.dtype), task(data), chosen, DECODING
    )
    return runner.run(llava, TaskQuestions(task(data)), chosen, DECODING, fingerprint, workdir)


def task(data: pathlib.Path) -> Task:
    return Task(
        digits.Digits(),
        data / digits.QUESTIONS_FILE,
        data / digits.IMAGE_FOLDER,
        data / digits.ANNOTATIONS_FILE,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_tiny_llava(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("digits")
    digits.write_files(folder, split="test", scenes=SCENES)
    return folder


@pytest.fixture(scope="module")
def straight(
    model: pathlib.Path, data: pathlib.Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bytes, runner.RunScores]:
    workdir = tmp_path_factory.mktemp("straight")
    scored = answer(model, data, workdir)
    return (workdir / "answers.jsonl").read_bytes(), scored


def test_a_run_answers_everything_once(straight: tuple[bytes, runner.RunScores]) -> None:
    lines, scored = straight
    rows = [json.loads(line) for line in lines.splitlines()]
    assert len(rows) == len({row["question_id"] for row in rows}) == len(scored.visual_tokens)
    assert scored.failed == 0
    assert 1 <= scored.visual_tokens.min() < scored.visual_tokens.max()
    assert scored.metrics["visual_tokens_mean"] == pytest.approx(scored.visual_tokens.mean())
    assert 0 < scored.metrics["token_efficiency"] <= 1


def test_the_metrics_are_those_of_the_answers(
    data: pathlib.Path, straight: tuple[bytes, runner.RunScores]
) -> None:
    lines, scored = straight
    truths = digits.Digits().read_annotations(data / digits.ANNOTATIONS_FILE)
    right: dict[str, list[bool]] = {}
    for row in map(json.loads, lines.splitlines()):
        family, text = row["question_id"].rpartition("_")[2], conclusion(row["text"])
        answer = truths[row["question_id"]].answer
        is_right = says_yes(text) == (answer == "yes") if family == "presence" else text == answer
        right.setdefault(family, []).append(is_right)
    assert right.keys() == set(FAMILIES)
    for family, rows in right.items():
        assert scored.metrics[f"accuracy_{family}"] == pytest.approx(100 * np.mean(rows))
    mean = np.mean([np.mean(rows) for rows in right.values()])
    assert scored.metrics["accuracy_mean"] == pytest.approx(100 * mean)
    assert scored.per_question["accuracy_mean"].mean() == pytest.approx(mean)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2])
def test_kill_at_any_moment_changes_no_byte(
    kills: int,
    model: pathlib.Path,
    data: pathlib.Path,
    straight: tuple[bytes, runner.RunScores],
    tmp_path: pathlib.Path,
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(model), str(data), str(tmp_path / "run")]
    rng = random.Random(0)
    journal = tmp_path / "run" / "journal.jsonl"
    for _ in range(kills):
        process = subprocess.Popen(command)
        before = journal.stat().st_size if journal.exists() else 0
        while process.poll() is None and not (journal.exists() and journal.stat().st_size > before):
            time.sleep(0.02)
        time.sleep(rng.random() * 0.2)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with journal.open("ab") as file:
        file.write(b'{"index": 3, "question')  # torn by the last kill
    answer(model, data, tmp_path / "run")
    assert (tmp_path / "run" / "answers.jsonl").read_bytes() == straight[0]


class Killed(BaseException):
    """In place of a signal, so that several of them take seconds."""


@pytest.mark.slow
def test_eight_kills_of_a_run_that_shares_prefixes_change_no_byte(
    model: pathlib.Path,
    data: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Over a file that does not keep an image's questions together; against a run without sharing
    of the same file."""
    mixed, workdir = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, mixed)
    for name in (digits.QUESTIONS_FILE, digits.ANNOTATIONS_FILE):
        lines = (mixed / name).read_text().splitlines(keepends=True)
        random.Random(1).shuffle(lines)
        (mixed / name).write_text("".join(lines))
    apart = dataclasses.replace(ENGINE, share_prefixes=False)
    expected = answer(model, mixed, tmp_path / "apart", engine=apart)
    assert expected.metrics["computed_over_request_tokens"] == 1
    monkeypatch.setattr(runner, "COMMIT_ROWS", 1)
    append = runner.Journal.append
    rng = random.Random(0)
    left = 0

    def append_and_die(journal: runner.Journal, outcomes: list[runner.RowOutcome]) -> None:
        nonlocal left
        append(journal, outcomes)
        left -= len(outcomes)
        if outcomes and left <= 0:
            with (workdir / "journal.jsonl").open("ab") as file:
                file.write(b'{"index": 3, "question'[: rng.randint(0, 22)])
            raise Killed

    monkeypatch.setattr(runner.Journal, "append", append_and_die)
    for _ in range(20):
        left = 1
        with pytest.raises(Killed):
            answer(model, mixed, workdir)
    monkeypatch.setattr(runner.Journal, "append", append)
    answer(model, mixed, workdir)
    answers = (workdir / "answers.jsonl").read_bytes()
    assert answers == (tmp_path / "apart" / "answers.jsonl").read_bytes()
    rows = [json.loads(line) for line in (workdir / "journal.jsonl").read_text().splitlines()[1:]]
    assert sorted(row["index"] for row in rows) == list(range(len(answers.splitlines())))
    straight = answer(model, mixed, tmp_path / "straight")
    assert (tmp_path / "straight" / "answers.jsonl").read_bytes() == answers
    assert straight.metrics["computed_over_request_tokens"] < 0.8
    assert straight.metrics == pytest.approx(
        expected.metrics | {name: straight.metrics[name] for name in runner.RUN_FIGURES}
    )


def test_a_rerun_scores_nothing_twice(
    model: pathlib.Path,
    data: pathlib.Path,
    straight: tuple[bytes, runner.RunScores],
    tmp_path: pathlib.Path,
) -> None:
    answer(model, data, tmp_path)
    again = answer(model, data, tmp_path)
    assert again.metrics["images_per_second"] is None
    assert (tmp_path / "answers.jsonl").read_bytes() == straight[0]
    with pytest.raises(ValueError, match=r"reduction was 'prumerge' and is 'prumerge\+'"):
        answer(model, data, tmp_path, reduction="prumerge+")


def test_bad_rows_are_reported_and_mended_by_a_rerun(
    model: pathlib.Path,
    data: pathlib.Path,
    straight: tuple[bytes, runner.RunScores],
    tmp_path: pathlib.Path,
) -> None:
    copy = tmp_path / "data"
    digits.write_files(copy, split="test", scenes=SCENES)
    broken = sorted((copy / digits.IMAGE_FOLDER).iterdir())[2]
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    scored = answer(model, copy, tmp_path / "run")
    errors = [
        json.loads(line) for line in (tmp_path / "run" / "errors.jsonl").read_text().splitlines()
    ]
    assert scored.failed == len(errors) > 0
    assert all(broken.name in error["error"] for error in errors)
    assert "accuracy_mean" not in scored.metrics
    expected = [json.loads(line) for line in straight[0].splitlines()]
    got = (tmp_path / "run" / "answers.jsonl").read_text().splitlines()
    failed = {error["question_id"] for error in errors}
    assert [json.loads(line)["text"] for line in got] == [
        row["text"] for row in expected if row["question_id"] not in failed
    ]
    broken.write_bytes(content)
    mended = answer(model, copy, tmp_path / "run")
    assert mended.failed == 0
    assert (tmp_path / "run" / "answers.jsonl").read_bytes() == straight[0]


def test_missing_files_are_found_before_the_model_is_needed(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"questions\.jsonl"):
        TaskQuestions(task(tmp_path))
    digits.write_files(tmp_path, split="test", scenes=1)
    with pytest.raises(ValueError, match="cannot be scored without annotations"):
        TaskQuestions(Task(digits.Digits(), tmp_path / digits.QUESTIONS_FILE, tmp_path, None))
    with pytest.raises(FileNotFoundError, match="image folder"):
        TaskQuestions(
            Task(
                digits.Digits(),
                tmp_path / digits.QUESTIONS_FILE,
                tmp_path / "nowhere",
                tmp_path / digits.ANNOTATIONS_FILE,
            )
        ).check_images()


@pytest.mark.slow
def test_downsampled_images_run(
    model: pathlib.Path, data: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    scored = answer(model, data, tmp_path, reduction="downsample:2")
    np.testing.assert_array_equal(scored.visual_tokens, 4)
