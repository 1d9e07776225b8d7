"""Several processes as one run: how they find each other, and how none outlives the others."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import jax

# How long a finished process waits for the others: one of them may still be writing the model.
# Its heartbeat shows that it is alive.
_SHUTDOWN_SECONDS = 3600


@contextmanager
def distributed_session(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    heartbeat_seconds: int,
) -> Iterator[None]:
    """Joins the other processes of the run where there are any, and leaves together with them.

    Without arguments JAX looks for a TPU pod, a SLURM step or Open MPI; where it finds none, the
    process is the only one. To be entered before anything touches a device.

    A process that fails here ends at once instead of waiting for its peers, which wait for it in a
    collective. They end by themselves: as soon as the connection breaks, or after
    `heartbeat_seconds` without a sign of life, as when a machine dies or a process hangs.

    Args:
      coordinator: HOST:PORT of process 0.
      num_processes: number of processes of the run.
      process_id: index of this process, from 0.
      heartbeat_seconds: time without a heartbeat after which a process counts as dead.

    Raises:
      ValueError: some of the three arguments are given and others neither given nor found.
    """
    several = _initialize(coordinator, num_processes, process_id, heartbeat_seconds)
    try:
        yield
    except BaseException as error:
        if not several:
            raise
        _leave_at_once(error)


def _initialize(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    heartbeat_seconds: int,
) -> bool:
    # JAX's own handler of SIGTERM would compete with ours.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=heartbeat_seconds,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        explicit = (coordinator, num_processes, process_id) != (None, None, None)
        if explicit or "coordinator_address should be defined" not in str(error):
            raise
        return False
    return jax.process_count() > 1


def _leave_at_once(error: BaseException) -> None:
    if isinstance(error, SystemExit) and not error.code:
        sys.exit()
    if isinstance(error, SystemExit):
        print(error.code, file=sys.stderr)
    else:
        traceback.print_exception(error)
    print(
        f"process {jax.process_index()} of {jax.process_count()} ends with the error above, "
        "and the others with it; the log of the process that ended first tells the cause",
        file=sys.stderr,
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
