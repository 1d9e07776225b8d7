"""Runs of two processes: the losses of one process, one end for both, and restarts."""

import json
import pathlib
import shutil
import signal
import subprocess
import time
from contextlib import AbstractContextManager

import ml_collections
import numpy as np
import pytest

from configs.digits import lora
from prumerge_jax.store import model_directory as directories
from prumerge_jax.training.checkpoint import verify
from prumerge_jax.training.run import run
from prumerge_jax.training.workdir import StopFlag
from tests.several_processes import PATIENCE, assert_end_well, launch, log_of, program

pytestmark = pytest.mark.slow

STEPS, HEARTBEAT = 10, 10
CONFIG_FILE = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({values!r}, convert_dict=True)
"""
# Programs that get the coordinator and the process's index as arguments: what a process sees of a
# mesh, and two processes that do nothing but ask each other.
SHARES = """
import json, sys
import jax
import numpy as np
from configs.digits.miniature import MODEL
from prumerge_jax.sharding import processes
from prumerge_jax.sharding.mesh import make_mesh
from prumerge_jax.sharding.startup import distributed_session
from prumerge_jax.store.model_directory import DirectoryWriter

with distributed_session(sys.argv[1], 2, int(sys.argv[2]), heartbeat_seconds=10):
    seen = {}
    batch = np.arange(8).reshape(8, 1) * 10
    for sizes in ((4, 1, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)):
        mesh = make_mesh(*sizes)
        shards = processes.DataShards.of(mesh)
        rows = shards.rows(8)
        placed = processes.to_global_array(batch[list(rows)], mesh)
        read = processes.addressable_rows(placed)[:, 0].tolist()
        seen[str(sizes)] = rows, placed.shape, read, shards.representatives
    try:
        processes.DataShards.of(make_mesh(2, 1, 1))
    except ValueError as error:
        seen["refused"] = str(error)
    seen["gathered"] = processes.allgather_ints([jax.process_index(), 7]).tolist()
    with DirectoryWriter(sys.argv[3], MODEL) as writer:
        for data, tensor in ((4, 1), (1, 4)):
            mesh = make_mesh(data, 1, tensor)
            rows = list(processes.DataShards.of(mesh).rows(8))
            writer.write_array(f"batch.{data}", processes.to_global_array(batch[rows], mesh))
        writer.write_file("note.txt", b"of both")
    print("seen" + json.dumps(seen))
"""
ASK = f"""
import sys
from prumerge_jax.sharding import processes
from prumerge_jax.sharding.startup import distributed_session

with distributed_session(sys.argv[1], 2, int(sys.argv[2]), heartbeat_seconds={HEARTBEAT}):
    while True:
        processes.allgather_ints([0])
        print("asked", flush=True)
"""


def train(
    config: ml_collections.ConfigDict, workdir: pathlib.Path
) -> AbstractContextManager[list[subprocess.Popen]]:
    """`train.py` as two processes; their output is in `workdir.0` and `workdir.1`."""
    file = workdir.with_suffix(".py")
    file.write_text(CONFIG_FILE.format(values=config.to_dict()))

    def command(coordinator: str, index: int) -> list[str]:
        return [
            "train.py", f"--config={file}", f"--workdir={workdir}", f"--coordinator={coordinator}",
            "--num_processes=2", f"--process_id={index}", f"--heartbeat_seconds={HEARTBEAT}",
        ]  # fmt: skip

    return launch(command, workdir)


def saved_steps(workdir: pathlib.Path) -> list[int]:
    found = (workdir / "checkpoints").glob("step_" + "[0-9]" * 8)
    return sorted(int(path.name.removeprefix("step_")) for path in found)


def wait_for_step(workdir: pathlib.Path, step: int, processes: list[subprocess.Popen]) -> None:
    end = time.monotonic() + PATIENCE
    while step not in saved_steps(workdir):
        ended = [process.poll() for process in processes]
        assert ended == [None, None], log_of(workdir, 0) + log_of(workdir, 1)
        assert time.monotonic() < end, f"step {step} was not saved"
        time.sleep(0.05)


def records(workdir: pathlib.Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl` without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if not name.endswith(("_second", "_step"))}
        for line in lines
    ]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ml_collections.ConfigDict:
    config = lora.get_config("tiny")
    config.data.directory = str(tmp_path_factory.mktemp("data"))
    config.data.train_scenes = 16
    config.model.vision.num_layers = config.model.text.num_layers = 2
    # Two samples fill a row, or one does: the processes need different numbers of micro-batches.
    config.max_length = 310
    config.batch_size = 8
    config.steps = STEPS
    config.run.rows_per_shard = 1
    config.run.save_every = 2
    config.run.keep = STEPS
    config.run.mesh.update({"data": 2, "fsdp": 1, "tensor": 2})
    return config


@pytest.fixture(scope="module")
def straight(
    config: ml_collections.ConfigDict, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """The run of one process, without any interruption."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    run(config, workdir, StopFlag())
    return workdir


@pytest.fixture(scope="module")
def terminated(
    config: ml_collections.ConfigDict, tmp_path_factory: pytest.TempPathFactory
) -> pathlib.Path:
    """A run of two processes, the second of which got SIGTERM."""
    workdir = tmp_path_factory.mktemp("terminated") / "run"
    with train(config, workdir) as processes:
        wait_for_step(workdir, 2, processes)
        processes[1].send_signal(signal.SIGTERM)
        assert_end_well(processes, workdir)
    return workdir


def assert_same_end(workdir: pathlib.Path, straight: pathlib.Path) -> None:
    assert saved_steps(workdir)[-1] == STEPS
    assert records(workdir) == records(straight)
    arrays = directories.read_manifest(straight / "model").arrays
    directories.verify(workdir / "model")
    assert directories.read_manifest(workdir / "model").arrays == arrays
    for path in arrays:
        expected = directories.read_array(straight / "model", path)
        found = directories.read_array(workdir / "model", path)
        assert found.tobytes() == expected.tobytes(), path


def test_each_process_holds_the_rows_of_its_devices_and_writes_them(tmp_path: pathlib.Path) -> None:
    written = tmp_path / "model"
    with launch(program(SHARES, str(written)), tmp_path / "shares") as processes:
        assert_end_well(processes, tmp_path / "shares")
    first, second = (
        json.loads(log_of(tmp_path / "shares", index).split("seen", 1)[1].splitlines()[0])
        for index in range(2)
    )
    halves = {"(4, 1, 1)", "(2, 1, 2)", "(1, 2, 2)"}
    for index, seen in enumerate((first, second)):
        for sizes in halves:
            rows = list(range(4 * index, 4 * index + 4))
            assert seen[sizes] == [rows, [8, 1], [10 * row for row in rows], [0, 1]], sizes
        assert seen["(1, 1, 4)"] == [list(range(8)), [8, 1], list(range(0, 80, 10)), [0]]
        assert "expected every process to have some" in seen["refused"]
        assert seen["gathered"] == [[0, 7], [1, 7]]
    directories.verify(written)
    for path in ("batch.4", "batch.1"):
        stored = directories.read_array(written, path)
        np.testing.assert_array_equal(stored, np.arange(8).reshape(8, 1) * 10)


def test_sigterm_to_one_process_ends_both_at_one_step(
    terminated: pathlib.Path, straight: pathlib.Path
) -> None:
    stopped = saved_steps(terminated)[-1]
    assert 2 < stopped < STEPS - 2
    for step in saved_steps(terminated):
        verify(terminated / "checkpoints" / f"step_{step:08d}")
    assert not (terminated / "model").exists()
    assert records(terminated) == records(straight)[:stopped]
    assert f"stopped by another process after step {stopped}" in log_of(terminated, 0)
    assert "step 1" in log_of(terminated, 0)
    assert "step 1" not in log_of(terminated, 1)


def test_two_go_on_where_two_stopped_a_killed_one_ends_the_other_and_one_goes_on(
    config: ml_collections.ConfigDict,
    terminated: pathlib.Path,
    straight: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    workdir = pathlib.Path(shutil.copytree(terminated, tmp_path / "run"))
    with train(config, workdir) as processes:
        wait_for_step(workdir, saved_steps(workdir)[-1] // 2 * 2 + 2, processes)
        processes[1].kill()
        assert processes[0].wait(PATIENCE) != 0
    assert any(reason in log_of(workdir, 0) for reason in ("Gloo", "heartbeat"))
    assert not (workdir / "model").exists()
    run(config, workdir, StopFlag())  # exact only if the steps of the two were
    assert_same_end(workdir, straight)


@pytest.mark.parametrize(
    ("number", "victim", "reasons"),
    [
        pytest.param(signal.SIGKILL, 0, ["Gloo", "another task died"], id="killed"),
        pytest.param(signal.SIGSTOP, 0, ["another task died"], id="first hung"),
        pytest.param(signal.SIGSTOP, 1, ["stopped sending heartbeats"], id="second hung"),
    ],
)
def test_no_process_outlives_another(
    tmp_path: pathlib.Path, number: signal.Signals, victim: int, reasons: list[str]
) -> None:
    logs = tmp_path / "ask"
    other = 1 - victim
    with launch(program(ASK), logs) as processes:
        end = time.monotonic() + PATIENCE
        while "asked" not in log_of(logs, other):
            assert processes[other].poll() is None, log_of(logs, other)
            assert time.monotonic() < end
            time.sleep(0.05)
        processes[victim].send_signal(number)
        assert processes[other].wait(PATIENCE) != 0
    assert any(reason in log_of(logs, other) for reason in reasons)
