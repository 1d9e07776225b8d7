"""Scores a model, or an answers file, on benchmarks.

    eval.py --workdir DIR
    eval.py --workdir DIR --config.checkpoint=DIR --config.benchmark=pope
        --config.questions=FILE --config.images=DIR --config.annotations=PATH
        --config.reduction="full prumerge+"
    eval.py --workdir DIR --config.benchmark=pope --config.questions=FILE
        --config.images=DIR --config.annotations=PATH --config.answers=FILE
    eval.py --workdir DIR --config.checkpoint=DIR --config.questions=FILE --config.images=DIR
    eval.py --aot v5e:2x4 --config.checkpoint=llava-1.5-7b --config.reduction=prumerge+

The first scores the shipped miniature on its digits; the fourth answers your own questions, without
a score. Every field of configs/eval.py is a flag. A run that was interrupted resumes. Several
processes with the same command share the questions: those of a TPU pod and of SLURM find each
other, others are given `--coordinator`, `--num_processes` and `--process_id`. With `--aot` the
engine's functions are compiled for a TPU slice and not run; the checkpoint is then the name of a
published size, and every reduction is planned. Exit status: 0 if every row was scored, 3 if some
failed (errors.jsonl says why), 1 if it could not run.
"""

import pathlib
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from prumerge_jax.cli import command_line


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `eval.py` or `prumerge-eval`."""
    command_line.run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    values = command_line.workdir_or_aot("v5e:2x4", "the engine")
    flags.DEFINE_integer(
        "questions_per_image",
        1,
        "with --aot: so many questions share what is in front of them",
        lower_bound=1,
        flag_values=values,
    )
    command_line.define_processes(values)
    config = command_line.parse_with_config(argv, values, __doc__, default="eval")
    command_line.check_workdir_or_aot(values)
    if values.aot:
        return _plan(config, values.aot, values.questions_per_image)
    workdir = pathlib.Path(values.workdir)
    if config.answers:
        if values.coordinator:
            raise ValueError("--config.answers needs no model, and one process: no --coordinator")
        return _evaluate(config, workdir)
    with command_line.session(values), command_line.mistakes_in_one_line(argv):
        return _evaluate(config, workdir)


def _evaluate(config: ConfigDict, workdir: pathlib.Path) -> int:
    # These take seconds to import; a mistyped flag is answered before.
    import prumerge_jax.digits.benchmark  # noqa: F401, registers itself
    from prumerge_jax.evaluation.run import evaluate

    try:
        return evaluate(config, workdir)
    except RuntimeError as error:  # out of memory, or another process writes to the workdir
        raise ValueError(str(error)) from error


def _plan(config: ConfigDict, slice_name: str, questions_per_image: int) -> int:
    import jax

    from prumerge_jax import reductions
    from prumerge_jax.aot.compile import CopiesWeights, DoesNotFit
    from prumerge_jax.aot.inference import plan_inference
    from prumerge_jax.aot.topology import topology
    from prumerge_jax.engine.encoding import compute_dtype
    from prumerge_jax.evaluation.benchmarks.base import Benchmark
    from prumerge_jax.evaluation.config import engine_config
    from prumerge_jax.families import published

    jax.config.update("jax_platforms", "cpu")  # leaves a TPU of this machine free
    spellings = reductions.parse_list(config.reduction or Benchmark.reductions)
    model, where = published(config.checkpoint), topology(slice_name)
    shapes = engine_config(config.engine, config.mesh)
    dtype = compute_dtype(config.dtype or "bfloat16")
    for spelling in spellings:
        try:
            plan = plan_inference(
                model,
                shapes,
                spelling,
                where,
                config.mesh,
                dtype,
                questions_per_image=questions_per_image,
                quantize=config.quantize,
                cache_dtype=config.cache_dtype,
            )
        except (CopiesWeights, DoesNotFit) as error:
            raise ValueError(f"{spelling}: {error}") from error
        print("\n".join(plan.lines()), flush=True)
    return 0


if __name__ == "__main__":
    main()
