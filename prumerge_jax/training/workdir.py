"""The directory of a run: one run at a time, always with one configuration, and its graceful end.

Graceful shutdown: SIGTERM and SIGINT raise a flag; the loop stops at the next step boundary and
saves.
"""

import fcntl
import json
import logging
import os
import pathlib
import signal
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax

from prumerge_jax.messages import quoted
from prumerge_jax.store.atomic import write_atomically
from prumerge_jax.store.strict_json import load_json

_logger = logging.getLogger(__name__)

CONFIG = "config.json"
EXECUTION = "execution.json"
CHECKPOINTS = "checkpoints"
MODEL = "model"
RUN = "run"
"""The section of a configuration that says how a run is executed, not what it computes: devices,
cadence, workers. It alone may change when a run is resumed."""


class WorkdirError(ValueError):
    """A working directory cannot be used for this run; the message says why."""


class StopFlag:
    """Whether the run was asked to stop, and why."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Asks the run to stop at its next step boundary."""
        self.reason = reason


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """A flag that SIGTERM and SIGINT raise; a second signal of either kind ends at once."""
    flag = StopFlag()
    previous: dict[int, Any] = {}

    def handle(number: int, frame: types.FrameType | None) -> None:
        name = signal.Signals(number).name
        _logger.info("%s: stopping after this step, with a checkpoint", name)
        flag.request(name)
        signal.signal(number, previous[number])

    for number in (signal.SIGTERM.value, signal.SIGINT.value):
        previous[number] = signal.signal(number, handle)
    try:
        yield flag
    finally:
        for number in previous:
            signal.signal(number, previous[number])


@contextmanager
def claim_workdir(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Creates a working directory if need be, and locks it against other runs.

    The first process of a run holds the lock.

    Raises:
      WorkdirError: another run uses it.
    """
    try:
        os.makedirs(workdir, exist_ok=True)
    except OSError as error:
        raise WorkdirError(f"{workdir} cannot be a working directory: {error}") from None
    if jax.process_index() != 0:
        yield
        return
    lock = os.open(workdir, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise WorkdirError(f"{workdir} is in use by another run") from None
    finally:
        os.close(lock)


def write_config(workdir: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Marks a directory as that of a run with this configuration, plain JSON values."""
    write_atomically(pathlib.Path(workdir) / CONFIG, json.dumps(config, indent=1).encode())


def write_execution(workdir: str | os.PathLike[str], execution: Mapping[str, Any]) -> None:
    """Records what a run chose of its execution, plain JSON values."""
    write_atomically(pathlib.Path(workdir) / EXECUTION, json.dumps(execution, indent=1).encode())


def read_execution(workdir: str | os.PathLike[str]) -> Mapping[str, Any] | None:
    """What a run chose when it was last started; None before its first step.

    Raises:
      WorkdirError: the record cannot be read.
    """
    file = pathlib.Path(workdir) / EXECUTION
    try:
        return load_json(file) if file.exists() else None
    except (OSError, ValueError) as error:
        raise WorkdirError(
            f"{file} cannot be read ({error}); delete it, and the run chooses anew"
        ) from None


def check_config(workdir: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Checks that a run with this configuration may start or resume in a directory.

    Raises:
      WorkdirError: the directory holds other things than a run, or a run with another
        configuration; the message names the differing fields.
    """
    path = pathlib.Path(workdir)
    if path.exists() and not path.is_dir():
        raise WorkdirError(f"{path} is not a directory")
    if not path.exists():
        return
    file = path / CONFIG
    if not file.exists():
        # An earlier start may have failed before its first step; it left no more than these.
        own = {f"{CONFIG}.incomplete", CHECKPOINTS}
        if others := sorted({entry.name for entry in path.iterdir()} - own):
            raise WorkdirError(
                f"{path} holds {others[:5]} but no run; expected an empty directory, or one to "
                "resume"
            )
        return
    stored, given = _flat(load_json(file)), _flat(config)
    differences = [
        f"{name}: {quoted(stored.get(name, 'absent'))} before, "
        f"{quoted(given.get(name, 'absent'))} now"
        for name in sorted(set(stored) | set(given))
        if stored.get(name, "absent") != given.get(name, "absent")
        and not name.startswith(f"{RUN}.")
    ]
    if differences:
        more = f"; … and {len(differences) - 10} more" if len(differences) > 10 else ""
        raise WorkdirError(
            f"{path} holds a run with another configuration "
            f"({'; '.join(differences[:10])}{more}); resume it "
            f"with the same, or use another workdir. Only fields of '{RUN}' may change"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
