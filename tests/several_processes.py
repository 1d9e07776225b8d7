"""Several processes on this machine, as one run."""

import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ROOT = pathlib.Path(__file__).resolve().parents[1]
DEVICES = 2
PATIENCE = 600  # seconds; far beyond what a slow machine takes to compile, save and end


@contextmanager
def launch(
    command: Callable[[str, int], list[str]], logs: pathlib.Path, number: int = 2
) -> Iterator[list[subprocess.Popen]]:
    """Processes on two devices each, killed at the end; process i writes to `logs.i`.

    `command` gives the arguments of Python, from the coordinator's address and i.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        # The last one counts; the others round this process and those alike.
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={DEVICES}",
    }
    processes: list[subprocess.Popen] = []
    try:
        for index in range(number):
            with open(f"{logs}.{index}", "w") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, *command(coordinator, index)], cwd=ROOT, env=environment,
                        stdout=log, stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def program(text: str, *arguments: str) -> Callable[[str, int], list[str]]:
    return lambda coordinator, index: ["-c", text, coordinator, str(index), *arguments]


def log_of(workdir: pathlib.Path, index: int) -> str:
    return pathlib.Path(f"{workdir}.{index}").read_text()


def assert_end_well(processes: list[subprocess.Popen], logs: pathlib.Path) -> None:
    statuses = [process.wait(PATIENCE) for process in processes]
    output = "".join(log_of(logs, index) for index in range(len(processes)))
    assert statuses == len(processes) * [0], output
