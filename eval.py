"""Scores a model, or an answers file, on benchmarks.

    python eval.py --workdir DIR --config.checkpoint=DIR
    python eval.py --workdir DIR --config.checkpoint=DIR --config.benchmark=pope
        --config.questions=FILE --config.images=DIR --config.annotations=PATH
        --config.reduction="full prumerge+"
    python eval.py --workdir DIR --config.benchmark=pope --config.questions=FILE
        --config.images=DIR --config.annotations=PATH --config.answers=FILE

The first scores a model of the digits on pictures it draws. Every field of configs/eval.py is a
flag. A run that was interrupted goes on where it was. Exit
status: 0 if every row was scored, 3 if some failed (errors.jsonl says why), 1 if it could not run.
"""

import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

from prumerge_jax.evaluation.suite import evaluate

_CONFIG = config_flags.DEFINE_config_file("config", "configs/eval.py", "what to score")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "directory of the run; new, or to go on with", required=True
)


def main(argv: list[str]) -> None:
    """Runs the evaluation."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    try:
        status = evaluate(_CONFIG.value, pathlib.Path(_WORKDIR.value))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"eval.py: {error}")
    sys.exit(status)


if __name__ == "__main__":
    app.run(main)
