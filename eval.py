"""Scores a model, or an answers file, on benchmarks.

    python eval.py --workdir DIR
    python eval.py --workdir DIR --config.checkpoint=DIR --config.benchmark=pope
        --config.questions=FILE --config.images=DIR --config.annotations=PATH
        --config.reduction="full prumerge+"
    python eval.py --workdir DIR --config.benchmark=pope --config.questions=FILE
        --config.images=DIR --config.annotations=PATH --config.answers=FILE
    python eval.py --aot v5e:2x4 --config.checkpoint=llava-1.5-7b

The first scores the shipped miniature on its digits. Every field of configs/eval.py is a
flag. A run that was interrupted goes on where it was. With `--aot` the engine's programs are
compiled for a TPU slice and not run; the checkpoint is then the name of a published size. Exit
status: 0 if every row was scored, 3 if some failed (errors.jsonl says why), 1 if it could not run.
"""

import pathlib
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from prumerge_jax import prumerge
from prumerge_jax.aot.compile import DoesNotFit
from prumerge_jax.aot.inference import plan_inference
from prumerge_jax.aot.topology import topology
from prumerge_jax.engine.shapes import EVALUATION_SIZES, EngineConfig
from prumerge_jax.evaluation.run import evaluate
from prumerge_jax.models.config import published

_CONFIG = config_flags.DEFINE_config_file(
    "config", str(pathlib.Path(__file__).parent / "configs" / "eval.py"), "what to score"
)
_WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; new, or to go on with")
_AOT = flags.DEFINE_string(
    "aot", None, "a TPU slice, as v5e:2x4: print the plan of the engine on it, and run nothing"
)


def main(argv: list[str]) -> None:
    """Runs the evaluation."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    if _AOT.value is not None:
        return _plan(_AOT.value)
    assert _WORKDIR.value is not None  # one of the two flags is given
    try:
        status = evaluate(_CONFIG.value, pathlib.Path(_WORKDIR.value))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"eval.py: {error}")
    sys.exit(status)


def _plan(slice_name: str) -> None:
    jax.config.update("jax_platforms", "cpu")  # a TPU of this machine stays free
    config = _CONFIG.value
    try:
        plan = plan_inference(
            published(config.checkpoint),
            EngineConfig(**config.engine, defaults=EVALUATION_SIZES),
            prumerge.preset("prumerge+"),
            topology(slice_name),
            config.mesh,
        )
    except (DoesNotFit, ModuleNotFoundError, ValueError) as error:
        sys.exit(f"eval.py: {error}")
    print("\n".join(plan.lines()))


if __name__ == "__main__":
    flags.mark_flags_as_mutual_exclusive(["workdir", "aot"], required=True)
    app.run(main)
