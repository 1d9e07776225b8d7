"""What several processes of one run tell each other: values, failures, and that they are here.

Every process must call each of these functions at the same point of its execution. With a single
process they cost nothing. Waiting is done on the host, for as long as the others take: a collective
would time out. The end of a process ends it, see `startup.distributed_session`.
"""

import itertools
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

from prumerge_jax.messages import quoted

Result = TypeVar("Result")

FAREWELL_SECONDS = 2
"""How long process 0 stays after a failure: when it ends, JAX aborts the others in mid-sentence."""

_LONGEST_WAIT_MS = 30 * 24 * 3600 * 1000
_barriers = itertools.count()


def is_leader() -> bool:
    """Whether this is process 0, or the only one. Touches no device where there is only one."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def gather(value: Any) -> list[Any]:
    """The value of each process, by its index.

    Args:
      value: anything that JSON can express, and NumPy's scalars; tuples arrive as lists.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return [value]
    wait = multihost.get_barrier_sync_fn()
    wait(key=f"prumerge_jax.agreement.{next(_barriers)}", timeout_ms=_LONGEST_WAIT_MS)
    own = np.frombuffer(json.dumps(value, default=np.generic.item).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array([len(own)], np.int32))[:, 0]
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(own)] = own
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def together(action: Callable[[], Result]) -> Result:
    """The result of an action that every process takes; a failure of one is a failure of all.

    Raises:
      Exception: what the action raised here.
      ValueError: it failed in another process; the message says in which and why.
    """
    failure = result = None
    try:
        result = action()
    except Exception as error:
        failure = error
    reasons = gather(None if failure is None else " ".join(str(failure).split()))
    failed = [process for process, reason in enumerate(reasons) if reason is not None]
    if failed and len(reasons) > 1 and is_leader():
        time.sleep(FAREWELL_SECONDS)
    if failure is not None:
        raise failure
    if failed:
        raise ValueError(f"process {failed[0]}: {reasons[failed[0]]}")
    return result  # type: ignore[return-value]


def leader_first(action: Callable[[], Result]) -> Result:
    """`together`, where the others act after process 0, and find what it has written.

    Raises: as `together`.
    """
    if is_leader():
        result = together(action)
        together(lambda: None)
        return result
    together(lambda: None)
    return together(action)


def require_same(values: Mapping[str, Any], advice: str) -> None:
    """Checks that all processes have the same values.

    Args:
      values: flat, JSON values by name.
      advice: what to do where they differ.

    Raises:
      ValueError: a value differs; the message, the same in all processes, names it.
    """
    first, *others = gather(dict(values))
    for process, found in enumerate(others, start=1):
        for name in sorted(first.keys() | found.keys()):
            ours, theirs = first.get(name, "absent"), found.get(name, "absent")
            if ours != theirs:
                raise ValueError(
                    f"{name} is {quoted(ours)} in process 0 and {quoted(theirs)} in process "
                    f"{process}; {advice}"
                )
