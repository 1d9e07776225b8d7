"""The directory of a run: one run at a time, and always with the same configuration."""

import fcntl
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax

from prumerge_jax.store.strict_json import load_json

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
RUN = "run"
"""The section of a configuration that says how a run is executed, not what it computes: devices,
cadence, workers. It alone may change when a run is resumed."""


class WorkdirError(ValueError):
    """A working directory cannot be used for this run; the message says why."""


@contextmanager
def claim_workdir(workdir: str | os.PathLike[str]) -> Iterator[None]:
    """Creates a working directory if need be, and locks it against other runs.

    Of several processes of a run the first one holds the lock.

    Raises:
      WorkdirError: another run uses it.
    """
    os.makedirs(workdir, exist_ok=True)
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
    new = pathlib.Path(workdir) / f"{CONFIG}.new"
    new.write_text(json.dumps(config, indent=1))
    new.replace(pathlib.Path(workdir) / CONFIG)


def check_config(workdir: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Checks that a run with this configuration may start or go on in a directory.

    Raises:
      WorkdirError: the directory holds other things than a run, or a run with another
        configuration; the message names the differing fields.
    """
    path = pathlib.Path(workdir)
    file = path / CONFIG
    if not file.exists():
        # An earlier start may have failed before its first step; it left no more than these.
        own = {f"{CONFIG}.new", CHECKPOINTS}
        if others := sorted({entry.name for entry in path.iterdir()} - own):
            raise WorkdirError(
                f"{path} holds {others[:5]} but no run; expected an empty directory, or one to "
                "resume"
            )
        return
    stored, given = _flat(load_json(file)), _flat(config)
    differences = [
        f"{name}: {stored.get(name, 'absent')!r} before, {given.get(name, 'absent')!r} now"
        for name in sorted(set(stored) | set(given))
        if stored.get(name, "absent") != given.get(name, "absent")
        and not name.startswith(f"{RUN}.")
    ]
    if differences:
        raise WorkdirError(
            f"{path} holds a run with another configuration ({'; '.join(differences)}); resume it "
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
