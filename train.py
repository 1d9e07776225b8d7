"""Trains a LLaVA, or a part of one, as a configuration file says.

    python train.py --config configs/prumerge_7b_lora.py --workdir runs/prumerge_7b
        --config.weights=DIR --config.data.json_file=FILE --config.data.image_folder=DIR

Every field of the configuration is a flag. A workdir that holds a run already is resumed, exactly;
with another configuration it is refused. SIGTERM and SIGINT save and end with status 0.
"""

import logging
import sys
from collections.abc import Sequence

import absl.logging
from absl import app, flags
from ml_collections import config_flags

from prumerge_jax.models.manifest import DirectoryError
from prumerge_jax.training.checkpoint import CheckpointError
from prumerge_jax.training.loop import TrainingError
from prumerge_jax.training.run import run
from prumerge_jax.training.stop import stop_on_signals
from prumerge_jax.training.workdir import WorkdirError

_CONFIG = config_flags.DEFINE_config_file("config", None, "a file of configs/", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "directory of the run; new, or to be resumed", required=True
)


def main(argv: Sequence[str]) -> None:
    """Runs one training stage."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    absl.logging.set_verbosity(absl.logging.WARNING)  # Orbax speaks of every file
    logging.getLogger("prumerge_jax").setLevel(logging.INFO)
    with stop_on_signals() as stop:
        try:
            run(_CONFIG.value, _WORKDIR.value, stop)
        except (CheckpointError, DirectoryError, TrainingError, WorkdirError) as error:
            sys.exit(f"train.py: {error}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
