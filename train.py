"""Trains a LLaVA, or a part of one, as a configuration file says.

    python train.py --config configs/prumerge_7b_lora.py --workdir runs/prumerge_7b
        --config.weights=DIR --config.data.json_file=FILE --config.data.image_folder=DIR
    python train.py --config configs/prumerge_7b_lora.py --aot v5e:8x8

Every field of the configuration is a flag. A workdir that holds a run already is resumed, exactly;
with another configuration it is refused. SIGTERM and SIGINT save and end with status 0. With
`--aot` the step is compiled for a TPU slice and not run: no weights, no data, no TPU.
"""

import logging
import sys
from collections.abc import Sequence

import absl.logging
import jax
from absl import app, flags
from ml_collections import config_flags

import prumerge_jax.digits.training  # noqa: F401, registers what its recipes name
from prumerge_jax.aot.compile import DoesNotFit
from prumerge_jax.aot.topology import topology
from prumerge_jax.aot.training import plan_training
from prumerge_jax.sharding.startup import distributed_session
from prumerge_jax.training.loop import TrainingError
from prumerge_jax.training.run import run
from prumerge_jax.training.workdir import stop_on_signals

_CONFIG = config_flags.DEFINE_config_file("config", None, "a file of configs/", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; new, or to be resumed")
_AOT = flags.DEFINE_string(
    "aot", None, "a TPU slice, as v5e:8x8: print the plan of a step on it, and run nothing"
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0; found on TPU pods, by SLURM and by Open MPI"
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "of the run, with --coordinator")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "this one, from 0, with --coordinator")
_HEARTBEAT_SECONDS = flags.DEFINE_integer(
    "heartbeat_seconds", 60, "a process silent for so long counts as dead, and all end", 1
)


def main(argv: Sequence[str]) -> None:
    """Runs one training."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    if _AOT.value is not None:
        return _plan(_AOT.value)
    assert _WORKDIR.value is not None  # one of the two flags is given
    absl.logging.set_verbosity(absl.logging.WARNING)  # Orbax speaks of every file
    processes = distributed_session(
        _COORDINATOR.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        heartbeat_seconds=_HEARTBEAT_SECONDS.value,
    )
    with processes, stop_on_signals() as stop:
        level = logging.INFO if jax.process_index() == 0 else logging.WARNING
        logging.getLogger("prumerge_jax").setLevel(level)
        try:
            run(_CONFIG.value, _WORKDIR.value, stop)
        except (OSError, TrainingError, ValueError) as error:
            sys.exit(f"train.py: {error}")


def _plan(slice_name: str) -> None:
    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine stays free
    try:
        plan = plan_training(_CONFIG.value, topology(slice_name))
    except (DoesNotFit, ModuleNotFoundError, ValueError) as error:
        sys.exit(f"train.py: {error}")
    print("\n".join(plan.lines()))


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    flags.mark_flags_as_mutual_exclusive(["workdir", "aot"], required=True)
    app.run(main)
