"""A training run, from its configuration to the model it exports."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import logging
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.messages import shortened
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.quantisation import format_named
from prumerge_jax.models.quantised_weights import check_blocks
from prumerge_jax.sharding.mesh import MESH_AXES, make_mesh, use_mesh
from prumerge_jax.sharding.processes import DataShards
from prumerge_jax.training.checkpoint import Checkpoints
from prumerge_jax.training.config import ConfigError, MeshConfig, TrainConfig, parse, with_sizes
from prumerge_jax.training.fit import fitted, make_step, shardings_of
from prumerge_jax.training.inputs import TrainingSource
from prumerge_jax.training.loop import LoopConfig, Outputs, TrainingError, train
from prumerge_jax.training.metrics import MetricWriter
from prumerge_jax.training.objectives.registry import Objective, make_objective
from prumerge_jax.training.optimizer import schedule
from prumerge_jax.training.weights import Pretrained, Weights, load_pretrained
from prumerge_jax.training.workdir import (
    CHECKPOINTS,
    MODEL,
    StopFlag,
    check_config,
    claim_workdir,
    read_execution,
    write_config,
    write_execution,
)

_logger = logging.getLogger(__name__)

# A shard holds a multiple of this many rows of every weight. By XLA's estimates for TPU slices 13B
# takes 1.7 times the cycles over all of 256 v5e chips, in shards of 20 rows, than over 4 x 64; and
# a third more over 64 v5p chips, where weights are then gathered by all-reduces, than over 2 x 32.
_SHARD_ROWS = 32

START: Mapping[str, Any] = {"samples": 0, "metrics": {}}
"""What `loop.train` saves with a step, before the first one."""


@dataclasses.dataclass(frozen=True)
class Setup:
    """A run that was checked: nothing expensive was read, nothing was written.

    Attributes:
      config: model sizes included, and nothing left open of how it is executed.
      fields: the configuration as it was given, plain JSON values, for the record.
      execution: what was left open, likewise.
      pretrained: the model it starts from.
      tokenizer: the model's.
      objective: what it is trained to do.
      source: its samples.
      mesh: the devices.
    """

    config: TrainConfig
    fields: Mapping[str, Any]
    execution: Mapping[str, Any]
    pretrained: Pretrained
    tokenizer: Tokenizer
    objective: Objective
    source: TrainingSource
    mesh: Mesh


def run(config: ml_collections.ConfigDict, workdir: str | os.PathLike[str], stop: StopFlag) -> None:
    """Trains, or resumes training, and writes the finished model to `workdir/model`.

    Args:
      config: one of `configs/`.
      workdir: gets checkpoints, metrics and model; one that holds a run already is resumed.
      stop: once raised, the run saves and returns without a model.

    Raises:
      ConfigError: a field of the configuration cannot be.
      WorkdirError: the directory is in use, or its run has another configuration.
      DirectoryError: the base weights are damaged or do not fit.
      CheckpointError: no checkpoint is intact, it belongs to other weights, or the last one could
        not be saved.
      TrainingError: the loss is not finite, the data ended, or the record cannot be written.
      ValueError: samples, mesh and configuration do not fit each other.
      OSError: a file cannot be read or written.
    """
    workdir = pathlib.Path(workdir)
    parsed, fields = parse(config), json.loads(config.to_json())
    check_config(workdir, fields)
    if (workdir / MODEL).exists():
        _logger.info("%s is finished; its model is in %s", workdir, workdir / MODEL)
        return
    setup = check(parsed, fields, read_execution(workdir))
    with claim_workdir(workdir), use_mesh(setup.mesh):
        check_config(workdir, fields)
        setup.pretrained.verify(hashes=setup.config.run.verify_weights)
        trained = _train(setup, workdir, stop)
        if trained is not None:
            _export(setup, trained, workdir / MODEL)


def check(
    config: TrainConfig, fields: Mapping[str, Any], execution: Mapping[str, Any] | None = None
) -> Setup:
    """Finds out whether a run can start, before anything is hashed, decoded or written.

    Args:
      config: as it was parsed.
      fields: the same as plain JSON values.
      execution: what the run that is resumed was executed with, see `fit.fitted`.

    Raises:
      ConfigError, DirectoryError, ValueError, OSError: as `run`.
    """
    pretrained = load_pretrained(config)
    config = with_sizes(config, pretrained.model)
    mesh = fitted_mesh(config)
    config, execution = fitted(config, mesh, execution)
    with use_mesh(mesh):
        objective = make_objective(config)
    tokenizer = pretrained.tokenizer(config.tokenizer_style)
    source = objective.open_source(tokenizer)
    _steps(config, source.samples)
    return Setup(config, fields, execution, pretrained, tokenizer, objective, source, mesh)


def fitted_mesh(config: TrainConfig) -> Mesh:
    """The mesh of all devices of this job that `config.run.mesh` describes.

    Raises:
      ValueError: as `fitted_sizes`, or the data shards do not divide the batch.
    """
    sizes = fitted_sizes(config.run.mesh, config.sizes, jax.device_count())
    shards = sizes["data"] * sizes["fsdp"]
    if config.batch_size % shards:
        raise ConfigError(
            f"batch_size is {config.batch_size}; expected a multiple of the {shards} data shards "
            f"of run.mesh {sizes}"
        )
    form = None if config.quantize is None else format_named(config.quantize)
    check_blocks(config.sizes.text, form, sizes)
    return make_mesh(**sizes)


def fitted_sizes(mesh: MeshConfig, model: LlavaConfig, devices: int) -> dict[str, int]:
    """The sizes of the mesh axes, where 0 takes the devices that remain.

    Where `data` and `fsdp` both are 0, `fsdp` takes as many as leave each shard a multiple of 32
    rows of its weight, and `data` the others.

    Raises:
      ValueError: `tensor` and another size are 0, or the sizes do not fit the devices.
    """
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    free = [axis for axis, size in sizes.items() if size == 0]
    if not free:
        return sizes
    remaining, excess = divmod(devices, math.prod(size for size in sizes.values() if size))
    if excess or not remaining or (len(free) > 1 and free != ["data", "fsdp"]):
        raise ConfigError(
            f"run.mesh {sizes} cannot be fitted to {devices} devices; expected a size of 0 for one "
            "axis or for data and fsdp, and the others to divide the devices"
        )
    if len(free) > 1:
        shards = math.gcd(model.vision.width, model.text.width) // _SHARD_ROWS
        sizes["fsdp"] = math.gcd(remaining, max(shards, 1))
        remaining //= sizes["fsdp"]
    sizes[free[0]] = remaining
    return sizes


def _steps(config: TrainConfig, samples: int) -> int:
    """Number of optimizer steps of a run over this many samples per epoch.

    Raises:
      ValueError: the samples do not fill a batch.
    """
    if samples < config.batch_size:
        raise ValueError(
            f"{samples} samples do not fill one batch of {config.batch_size}; set batch_size to at "
            f"most {samples}"
        )
    if config.steps is not None:
        return config.steps
    steps = int(config.epochs * samples) // config.batch_size
    if not steps:
        raise ValueError(
            f"{config.epochs} epochs of {samples} samples do not fill one batch of "
            f"{config.batch_size}"
        )
    return steps


def _train(setup: Setup, workdir: pathlib.Path, stop: StopFlag) -> Weights | None:
    """Restores or starts, and runs the loop. Returns what trained, None if it was stopped."""
    config, objective, mesh = setup.config, setup.objective, setup.mesh
    data = setup.source.prepare()
    total_steps = _steps(config, data.samples)
    step_function = make_step(config, objective, mesh, total_steps)
    checkpoints = _checkpoints(setup, workdir)
    restored = checkpoints.restore(step_function.abstract_state(objective.trained()))
    load = functools.partial(
        setup.pretrained.load,
        objective.module,
        trained=objective.learning_rates,
        shardings=shardings_of(config, objective, mesh),
    )
    frozen = load(objective.frozen())
    if restored is None:
        start, position = 0, START
        state = step_function.init(load(objective.trained()))
    else:
        start, state, position = restored
        _logger.info("resuming after step %d, %d samples", start, position["samples"])
    if jax.process_index() == 0:
        write_config(workdir, setup.fields)
        write_execution(workdir, setup.execution)
    shards = DataShards.of(mesh)
    rows = shards.rows(config.batch_size)
    samples = data.batches(position["samples"], rows, shards.total)
    with contextlib.ExitStack() as stack:
        metrics = None
        if jax.process_index() == 0:
            metrics = _metrics(config, workdir, start, total_steps, position["metrics"])
            stack.callback(metrics.close)
        state, done = train(
            step_function,
            state,
            frozen,
            objective.packer(setup.tokenizer, frozen, mesh, total_steps)(
                samples, position["samples"]
            ),
            LoopConfig(start, total_steps, config.run.save_every),
            Outputs(checkpoints, metrics),
            stop,
        )
    checkpoints.close()
    return objective.finish(state.trained) if done == total_steps else None


def _export(setup: Setup, trained: Weights, directory: pathlib.Path) -> None:
    source = {"training": setup.fields, "base_weights": setup.pretrained.identity()}
    try:
        setup.pretrained.export(directory, trained, setup.config.adapter, setup.mesh, source)
    except (OSError, RuntimeError, ValueError) as error:
        raise TrainingError(
            f"the model cannot be written to {directory}: {shortened(str(error), 300)}; the "
            "checkpoint of the last step is intact: mend that and run the same command"
        ) from error
    _logger.info("wrote the model to %s", directory)


def _checkpoints(setup: Setup, workdir: pathlib.Path) -> Checkpoints:
    metadata = {
        "base_weights": setup.pretrained.identity(),
        "config": setup.fields,
        "version": importlib.metadata.version("prumerge-jax"),
    }
    return Checkpoints(workdir / CHECKPOINTS, keep=setup.config.run.keep, metadata=metadata)


def _metrics(
    config: TrainConfig,
    workdir: pathlib.Path,
    start: int,
    total_steps: int,
    totals: Mapping[str, float],
) -> MetricWriter:
    factor, peak = schedule(config.optimizer, total_steps), config.learning_rates[0][1]
    return MetricWriter(
        workdir,
        start=start,
        total=total_steps,
        every=config.run.log_every,
        learning_rate=lambda step: peak * factor(step),
        totals=totals,
    )
