"""`eval.py` as several processes: the files of one, one end for all, and restarts."""

import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from prumerge_jax.digits import benchmark as digits
from tests.programs import run_program
from tests.several_processes import PATIENCE, ROOT, launch, log_of, program
from tests.tiny_llava import write_tiny_llava

pytestmark = pytest.mark.slow

SCENES, HEARTBEAT = 12, 10
OF_THE_LAST_RUN = ("token_efficiency", "computed_over_request_tokens")
# eval.py, one durable row at a time: slowly, so that it can be hit between rows, or killed while it
# merges, after the answers file and before the errors file.
SCRIPT = f"""
import os, signal, sys, time
from prumerge_jax.cli import evaluate
from prumerge_jax.evaluation import jsonfiles, runner

coordinator, index, number, end, *flags = sys.argv[1:]
runner.COMMIT_ROWS = 1
append, replace = runner.Journal.append, jsonfiles.replace_file

def slow_append(journal, outcomes):
    time.sleep(0.2 if end == "slow" else 0)
    append(journal, outcomes)

def replace_or_die(path, content):
    if end == "merge" and path.name == "errors.jsonl":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(path, content)

runner.Journal.append, jsonfiles.replace_file = slow_append, replace_or_die
evaluate.main(["eval.py", *flags, f"--coordinator={{coordinator}}", f"--num_processes={{number}}",
               f"--process_id={{index}}", "--heartbeat_seconds={HEARTBEAT}"])
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny model and its questions; two devices in each process."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_tiny_llava(folder / "tiny")
    digits.write_files(folder, scenes=SCENES)
    return [
        f"--config.checkpoint={folder / 'tiny'}",
        "--config.benchmark=digits",
        f"--config.questions={folder / digits.QUESTIONS_FILE}",
        f"--config.images={folder / digits.IMAGE_FOLDER}",
        f"--config.annotations={folder / digits.ANNOTATIONS_FILE}",
        "--config.reduction=prumerge",
        "--config.decoding.max_new_tokens=3",
        "--config.mesh.data=2",
    ]


@pytest.fixture(scope="module")
def straight(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The run of one process."""
    workdir = tmp_path_factory.mktemp("straight")
    done = run_program("eval.py", f"--workdir={workdir}", *flags)
    assert done.returncode == 0, done.stderr
    return workdir


@contextmanager
def evaluate(
    workdir: pathlib.Path, flags: list[str], number: int, end: str = "", **own: str
) -> Iterator[list[subprocess.Popen]]:
    """Several processes; `own` are flags of one of them, as `process_1="--a=b"`."""

    def command(coordinator: str, index: int) -> list[str]:
        given = [f"--workdir={workdir}", *flags, *own.get(f"process_{index}", "").split()]
        return program(SCRIPT, str(number), end, *given)(coordinator, index)

    with launch(command, workdir, number) as processes:
        yield processes


def rows_in(journal: pathlib.Path) -> int:
    return journal.read_bytes().count(b"\n") - 1 if journal.exists() else 0


def assert_same_results(workdir: pathlib.Path, straight: pathlib.Path) -> None:
    for name in ("answers.jsonl", "errors.jsonl"):
        assert (workdir / name).read_bytes() == (straight / name).read_bytes()
    metrics, expected = (
        json.loads((folder / "metrics.json").read_text()) for folder in (workdir, straight)
    )
    assert metrics.keys() == expected.keys()
    for name in metrics:
        if not name.endswith("_per_second") and name not in OF_THE_LAST_RUN:
            assert metrics[name] == expected[name], name


def test_killed_and_resumed_by_other_numbers_of_processes(
    flags: list[str], straight: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    workdir = tmp_path / "run"
    with evaluate(workdir, flags, 2, end="slow") as processes:
        end = time.monotonic() + PATIENCE
        while min(rows_in(workdir / name) for name in ("journal.jsonl", "journal.1.jsonl")) < 3:
            assert [process.poll() for process in processes] == [None, None], log_of(workdir, 0)
            assert time.monotonic() < end
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGKILL)
        assert processes[0].wait(PATIENCE) != 0
    reasons = ("stopped sending heartbeats", "Gloo", "another task died")
    assert any(reason in log_of(workdir, 0) for reason in reasons)
    assert not (workdir / "answers.jsonl").exists()
    before = (workdir / "journal.1.jsonl").read_bytes()

    with evaluate(workdir, flags, 3, end="merge") as processes:
        assert processes[0].wait(PATIENCE) == -signal.SIGKILL
        assert all(process.wait(PATIENCE) != 0 for process in processes[1:])
    assert (workdir / "answers.jsonl").exists()
    assert not (workdir / "metrics.json").exists()
    assert (workdir / "journal.1.jsonl").read_bytes().startswith(before)

    done = run_program("eval.py", f"--workdir={workdir}", *flags)
    assert done.returncode == 0, done.stderr
    assert_same_results(workdir, straight)
    journals = [*workdir.glob("journal*.jsonl")]
    assert len(journals) == 3
    answered = (straight / "answers.jsonl").read_bytes().count(b"\n")
    assert sum(map(rows_in, journals)) == answered  # none twice


def test_processes_that_do_not_fit_each_other_end_with_one_line(
    flags: list[str], tmp_path: pathlib.Path
) -> None:
    for name, own, message in (
        (
            "seed",
            {"process_1": "--config.decoding.seed=7"},
            "--config.decoding.seed is 0 in process 0 and 7 in process 1; start all processes with "
            "the same flags",
        ),
        (
            "mesh",
            {f"process_{index}": "--config.mesh.data=4" for index in range(2)},
            "--config.mesh needs 4 devices, and each process has 2",
        ),
    ):
        workdir = tmp_path / name
        with evaluate(workdir, flags, 2, **own) as processes:
            assert [process.wait(PATIENCE) for process in processes] == [1, 1]
        for index in range(2):
            lines = [line for line in log_of(workdir, index).splitlines() if "eval.py: " in line]
            assert len(lines) == 1, log_of(workdir, index)
            assert message in lines[0]
            assert "Traceback" not in log_of(workdir, index)


def test_one_process_without_the_checkpoint_ends_all(
    flags: list[str], tmp_path: pathlib.Path
) -> None:
    """Relative to where each process was started, as on a host without the file system."""
    (tmp_path / "here").mkdir()
    checkpoint = pathlib.Path(flags[0].partition("=")[2])
    (tmp_path / "here" / "model").symlink_to(checkpoint)
    places = [str(tmp_path / "here"), str(tmp_path)]
    given = [f"--workdir={tmp_path / 'run'}", *flags[1:], "--config.checkpoint=model"]

    def command(coordinator: str, index: int) -> list[str]:
        text = f"import os; os.chdir({places[index]!r})\n{SCRIPT}"
        return program(text, "2", "", *given)(coordinator, index)

    with launch(command, tmp_path / "run") as processes:
        assert [process.wait(PATIENCE) for process in processes] == [1, 1]
    first, second = (log_of(tmp_path / "run", index) for index in range(2))
    assert re.search(r"^eval\.py: process 1: .*model", first, re.M), first
    assert re.search(r"^eval\.py: .*model", second, re.M), second
    assert not (tmp_path / "run" / "journal.jsonl").exists()


def test_the_example_of_the_docs(tmp_path: pathlib.Path) -> None:
    text = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
    (example,) = re.findall(r"```\n(for i in 0 1; do\n.*?)\n```", text, re.S)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for known, ours in (
        ("8476", str(port)),
        ("runs/two_processes", str(tmp_path / "run")),
        ("scenes=100", "scenes=4"),
        (" python ", f" {sys.executable} "),
    ):
        assert known in example
        example = example.replace(known, ours)
    done = subprocess.run(["bash", "-c", example], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("accuracy") >= 1
    answers = (tmp_path / "run" / "answers.jsonl").read_text().splitlines()
    shares = [rows_in(path) for path in (tmp_path / "run").glob("journal*.jsonl")]
    assert sum(shares) == len(answers)
    assert min(shares) >= 4
