"""Trains a LLaVA, or a part of one, as a configuration says.

    train.py --config configs/prumerge_7b_lora.py --workdir runs/prumerge_7b
        --config.weights=DIR --config.data.json_file=FILE --config.data.image_folder=DIR
    train.py --config configs/prumerge_7b_lora.py --aot v5e:8x8

`--config` takes the name of a published recipe (`prumerge_7b_lora`) or a file, and every field of
the configuration is a flag. A workdir that holds a run already is resumed, exactly; with another
configuration it is refused. SIGTERM and SIGINT save and end with status 0. With `--aot` the step is
compiled for a TPU slice and not run: no weights, no data, no TPU.
"""

import logging
from collections.abc import Sequence

import absl.logging
from absl import flags
from ml_collections import ConfigDict

from prumerge_jax.cli import command_line


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `train.py` or `prumerge-train`."""
    command_line.run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    values = command_line.workdir_or_aot("v5e:8x8", "a step")
    command_line.define_processes(values)
    config = command_line.parse_with_config(argv, values, __doc__)
    command_line.check_workdir_or_aot(values)
    if values.aot:
        return _plan(config, values.aot)
    _train(argv, config, values)


def _train(argv: Sequence[str], config: ConfigDict, values: flags.FlagValues) -> None:
    # These take seconds to import; a mistyped flag is answered before.
    import jax

    import prumerge_jax.digits.training  # noqa: F401, registers what its recipes name
    from prumerge_jax.training.loop import TrainingError
    from prumerge_jax.training.run import run
    from prumerge_jax.training.workdir import stop_on_signals

    absl.logging.set_verbosity(absl.logging.WARNING)  # Orbax logs every file
    # Mistakes become one line inside the session, which prints what else a process dies of.
    with (
        command_line.session(values),
        command_line.mistakes_in_one_line(argv),
        stop_on_signals() as stop,
    ):
        level = logging.INFO if jax.process_index() == 0 else logging.WARNING
        logging.getLogger("prumerge_jax").setLevel(level)
        try:
            run(config, values.workdir, stop)
        except TrainingError as error:
            raise ValueError(str(error)) from error


def _plan(config: ConfigDict, slice_name: str) -> None:
    import jax

    import prumerge_jax.digits.training  # noqa: F401, registers what its recipes name
    from prumerge_jax.aot.compile import DoesNotFit
    from prumerge_jax.aot.topology import topology
    from prumerge_jax.aot.training import plan_training

    jax.config.update("jax_platforms", "cpu")  # leaves a TPU of this machine free
    try:
        plan = plan_training(config, topology(slice_name))
    except DoesNotFit as error:
        raise ValueError(str(error)) from error
    print("\n".join(plan.lines()))


if __name__ == "__main__":
    main()
