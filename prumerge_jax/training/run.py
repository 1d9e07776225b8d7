"""A training run, from its configuration to the model it leaves behind."""

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

from prumerge_jax.digits import captions
from prumerge_jax.sharding.mesh import MESH_AXES, make_mesh, use_mesh
from prumerge_jax.sharding.processes import DataShards
from prumerge_jax.training import inputs
from prumerge_jax.training.base import Base, open_base
from prumerge_jax.training.batches import RowFeed, RowShape
from prumerge_jax.training.checkpoint import Checkpoints
from prumerge_jax.training.loop import LoopConfig, train
from prumerge_jax.training.optimizer import OptimizerConfig, make_optimizer, schedule
from prumerge_jax.training.parameters import Weights
from prumerge_jax.training.stages import (
    ImageEncoder,
    NoImages,
    adapter_config,
    make_stage,
)
from prumerge_jax.training.step import TrainStep, state_shardings
from prumerge_jax.training.stop import StopFlag
from prumerge_jax.training.workdir import CHECKPOINTS, check_config, claim_workdir, write_config

_logger = logging.getLogger(__name__)

MODEL = "model"

# A shard holds a multiple of so many rows of every weight. By XLA's estimates for TPU slices 13B
# takes 1.7 times the cycles over all of 256 v5e chips, in shards of 20 rows, than over 4 x 64; and
# a third more over 64 v5p chips, where weights are then gathered by all-reduces, than over 2 x 32.
_SHARD_ROWS = 32


def run(config: ml_collections.ConfigDict, workdir: str | os.PathLike[str], stop: StopFlag) -> None:
    """Trains, or goes on training, and writes the finished model to `workdir/model`.

    Args:
      config: one of `configs/`.
      workdir: gets checkpoints, metrics and model; one that holds a run already is resumed.
      stop: once raised, the run saves and returns without a model.

    Raises:
      WorkdirError: the directory is in use, or its run has another configuration.
      DirectoryError: the base weights are damaged or do not fit.
      CheckpointError: no checkpoint is intact, or it belongs to other weights.
      TrainingError: the loss is not finite, or the data ended.
    """
    workdir = pathlib.Path(workdir)
    fields = json.loads(config.to_json())
    with claim_workdir(workdir):
        check_config(workdir, fields)
        if (workdir / MODEL).exists():
            _logger.info("%s is finished; its model is in %s", workdir, workdir / MODEL)
            return
        base = open_base(config)
        mesh = fitted_mesh(config)
        with use_mesh(mesh):
            trained = _train(config, fields, workdir, base, mesh, stop)
            if trained is not None:
                source = {"training": fields, "base_weights": base.hash()}
                adapter = adapter_config(config)
                base.export(workdir / MODEL, trained, adapter, mesh, source)
                _logger.info("wrote the model to %s", workdir / MODEL)


def fitted_mesh(config: ml_collections.ConfigDict) -> Mesh:
    """The mesh of all devices of this job that `config.run.mesh` describes.

    Raises:
      ValueError: as `fitted_sizes`, or the data shards do not divide the batch.
    """
    sizes = fitted_sizes(config, jax.device_count())
    shards = sizes["data"] * sizes["fsdp"]
    if config.batch_size % shards:
        raise ValueError(
            f"batch_size is {config.batch_size}; expected a multiple of the {shards} data shards "
            f"of mesh {sizes}"
        )
    return make_mesh(**sizes)


def fitted_sizes(config: ml_collections.ConfigDict, devices: int) -> dict[str, int]:
    """The sizes in `config.run.mesh`, where 0 takes the devices that remain.

    Where `data` and `fsdp` both are 0, `fsdp` takes as many as leave each shard a multiple of 32
    rows of its weight, and `data` the others.

    Raises:
      ValueError: `tensor` and another size are 0, or the sizes do not fit the devices.
    """
    sizes = {axis: config.run.mesh[axis] for axis in MESH_AXES}
    free = [axis for axis, size in sizes.items() if size == 0]
    if not free:
        return sizes
    remaining, excess = divmod(devices, math.prod(size for size in sizes.values() if size))
    if excess or not remaining or (len(free) > 1 and free != ["data", "fsdp"]):
        raise ValueError(
            f"run.mesh {sizes} cannot be fitted to {devices} devices; expected a size of 0 for one "
            "axis or for data and fsdp, and the others to divide the devices"
        )
    if len(free) > 1:
        shards = math.gcd(config.model.vision.width, config.model.text.width) // _SHARD_ROWS
        sizes["fsdp"] = math.gcd(remaining, max(shards, 1))
        remaining //= sizes["fsdp"]
    sizes[free[0]] = remaining
    return sizes


def _train(
    config: ml_collections.ConfigDict,
    fields: Mapping[str, Any],
    workdir: pathlib.Path,
    base: Base,
    mesh: Mesh,
    stop: StopFlag,
) -> Weights | None:
    """Restores or starts, and runs the loop. Returns what trained, None if it was stopped."""
    stage = make_stage(config, base.model)
    data, total_steps = open_data(config, base)
    optimizer_config = OptimizerConfig(**config.optimizer)
    optimizer = make_optimizer(optimizer_config, total_steps, stage.learning_rates)
    shardings = state_shardings(optimizer, stage.trained(), stage.template.shardings(mesh), mesh)
    step_function = TrainStep(stage.loss, optimizer, seed=config.seed, shardings=shardings)
    checkpoints = Checkpoints(
        workdir / CHECKPOINTS,
        keep=config.run.keep,
        metadata={
            "base_weights": base.hash(),
            "config": fields,
            "version": importlib.metadata.version("prumerge-jax"),
        },
    )
    restored = checkpoints.restore(step_function.abstract_state(stage.trained()))
    frozen_paths = set(stage.template.variables) - set(stage.learning_rates)
    frozen = base.weights(stage, frozen_paths, mesh)
    if restored is None:
        start, samples = 0, 0
        state = step_function.init(base.weights(stage, stage.learning_rates, mesh))
    else:
        start, state, samples = restored.step, restored.state, restored.position["samples"]
        _logger.info("resuming after step %d, %d samples", start, samples)
    feed = make_feed(config, base, frozen, mesh)
    rows = DataShards.of(mesh).rows(config.batch_size)
    if jax.process_index() == 0:
        write_config(workdir, fields)
    rate = schedule(optimizer_config, total_steps)
    state, done = train(
        step_function,
        state,
        frozen,
        feed(data.lists(samples, rows), samples),
        start=start,
        config=LoopConfig(total_steps, config.run.save_every, config.run.log_every),
        learning_rate=lambda step: config.learning_rates[0][1] * rate(step),
        checkpoints=checkpoints,
        workdir=workdir,
        stop=stop,
    )
    checkpoints.close()
    return stage.finished(state.trained) if done == total_steps else None


def open_data(config: ml_collections.ConfigDict, base: Base) -> tuple[inputs.Inputs, int]:
    """The samples of a run, and how many optimizer steps it has.

    Raises:
      ValueError: the samples do not fill a batch, or the contrastive stage has no `steps`.
    """
    tokenizer, vision = base.tokenizer(config.tokenizer_style), base.model.vision
    if config.objective == "contrastive":
        if config.steps is None:
            raise ValueError("the contrastive stage needs steps: its curriculum is a share of them")
        return captions.windows(config, tokenizer, vision, config.steps), config.steps
    data = inputs.conversations(config, tokenizer, vision.image_size)
    steps = config.steps
    if steps is None:
        steps = int(config.epochs * data.samples) // config.batch_size
    if not steps:
        raise ValueError(f"{data.samples} samples do not fill one batch of {config.batch_size}")
    return data, steps


def make_feed(
    config: ml_collections.ConfigDict, base: Base, frozen: Weights, mesh: Mesh
) -> captions.CaptionFeed | RowFeed:
    """What turns the samples of a run into micro-batches."""
    if config.objective == "contrastive":
        return captions.CaptionFeed(
            base.tokenizer(config.tokenizer_style),
            max_length=config.contrastive.text.max_positions,
            mesh=mesh,
        )
    vision = base.model.vision
    encode: ImageEncoder | NoImages = NoImages(config, vision, mesh)
    if config.reduction is not None:
        encode = ImageEncoder(config, vision, frozen, mesh)
    rows = config.run.rows_per_shard * mesh.shape["data"] * mesh.shape["fsdp"]
    return RowFeed(
        encode,
        num_patches=vision.num_patches,
        shape=RowShape(rows, config.max_length, config.position_ids),
        mesh=mesh,
    )
