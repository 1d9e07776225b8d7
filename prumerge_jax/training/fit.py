"""How a run is executed where its configuration leaves it open: the fastest that fits the memory.

What is chosen changes the time and the memory of a run. Its results are the same within rounding,
but for the draws of dropout, which depend on the micro-batch.
"""

import dataclasses
import itertools
import logging
from collections.abc import Mapping
from typing import Any, cast

import jax
from jax.sharding import Mesh, NamedSharding

from prumerge_jax.cost import CHIPS, Chip
from prumerge_jax.cost.training import (
    MicroBatch,
    micro_batch_seconds,
    rows_that_hide_gathers,
    working_bytes,
)
from prumerge_jax.models import tuning
from prumerge_jax.models.remat import REMAT
from prumerge_jax.models.tuning import Frozen
from prumerge_jax.sharding.mesh import (
    bytes_per_device,
    logical_spec,
    placed,
    use_mesh,
    without_axis,
)
from prumerge_jax.sharding.processes import allgather_ints
from prumerge_jax.training.config import TrainConfig
from prumerge_jax.training.objectives.next_token import LOGIT_POSITIONS, abstract_rows
from prumerge_jax.training.objectives.registry import Objective, make_objective
from prumerge_jax.training.optimizer import make_optimizer
from prumerge_jax.training.step import TrainStep, state_shardings
from prumerge_jax.training.weights import Shapes

_logger = logging.getLogger(__name__)

RESERVE = 0.1
"""Share of a device's memory that a choice leaves free."""
CHOICES = ("dots", "wide", "full")
"""Policies that are chosen from. `none` is not: by XLA's estimates it is no faster than `dots` and
takes several times the memory (docs/pods.md)."""
_FROZEN: tuple[Frozen, ...] = ("sharded", "replicated")


@dataclasses.dataclass(frozen=True)
class Execution:
    """What a configuration may leave open.

    Attributes:
      remat: policy of rematerialisation.
      rows_per_shard: rows of a micro-batch per data shard.
      frozen: where the frozen weights are.
    """

    remat: str
    rows_per_shard: int
    frozen: Frozen = "sharded"


CAUTIOUS = Execution("full", 1)
"""The execution where the memory is not known."""


def fitted(
    config: TrainConfig, mesh: Mesh, stored: Mapping[str, Any] | None = None
) -> tuple[TrainConfig, dict[str, Any]]:
    """The configuration with an `Execution` for the devices of this job.

    Args:
      config: model sizes included.
      mesh: of all devices of this job.
      stored: the record of the run that is resumed. On the same mesh of the same devices it is kept
        where the configuration leaves the choice open.

    Returns:
      The configuration with nothing left open, and the record as plain JSON values. All processes
      get those of the first.
    """
    device = mesh.devices.flat[0]
    place = {"mesh": dict(mesh.shape), "device": device.device_kind}
    is_open = config.remat == "auto" or not config.run.rows_per_shard or config.run.frozen == "auto"
    if not is_open:
        own, reason = CAUTIOUS, ""
    elif stored is not None and {name: stored.get(name) for name in place} == place:
        fields = [field.name for field in dataclasses.fields(Execution)]
        own = Execution(**{name: stored[name] for name in fields if name in stored})
        reason = "as this run began"
    else:
        own, reason = _chosen(config, mesh, device)
    own = execution(fixed(config, own))
    # Devices may differ in the memory that they leave to a program.
    numbers = [REMAT.index(own.remat), own.rows_per_shard, _FROZEN.index(own.frozen)]
    remat, rows, frozen = allgather_ints(numbers)[0].tolist()
    chosen = Execution(REMAT[remat], rows, _FROZEN[frozen])
    if is_open:
        _logger.info(
            "remat %s, %d rows per data shard, frozen weights %s: %s",
            chosen.remat, chosen.rows_per_shard, chosen.frozen, reason,
        )  # fmt: skip
    return fixed(config, chosen), {**dataclasses.asdict(chosen), **place}


def fixed(config: TrainConfig, chosen: Execution) -> TrainConfig:
    """The configuration with these where it leaves them open."""
    given = config.run
    run = dataclasses.replace(
        given,
        rows_per_shard=given.rows_per_shard or chosen.rows_per_shard,
        frozen=chosen.frozen if given.frozen == "auto" else given.frozen,
    )
    remat = cast(Any, chosen.remat) if config.remat == "auto" else config.remat
    return dataclasses.replace(config, remat=remat, run=run)


def execution(config: TrainConfig) -> Execution:
    """The execution of a configuration that leaves nothing open."""
    return Execution(config.remat, config.run.rows_per_shard, cast(Frozen, config.run.frozen))


def choices(
    config: TrainConfig,
    resident: Mapping[Frozen, int],
    sizes: Mapping[str, int],
    chip: Chip | None,
    available: float,
) -> list[Execution]:
    """Executions that fit by the cost model, the fastest first.

    Among equally fast ones replicated weights come first where `tuning.TRAINING` prefers them, and
    then what needs less memory. The last is what needs least, also where it does not fit.

    Args:
      config: model sizes included; what it does not leave open is the same in all.
      resident: see `resident_bytes`, of every entry of `layouts`.
      sizes: of the mesh.
      chip: peaks of its devices; None where they are not known.
      available: bytes of a device that a program may use.
    """
    policies = CHOICES if config.remat == "auto" else (config.remat,)
    peaks = chip or Chip(1.0, 1.0)  # only ratios of products matter
    one = micro_batch(config, sizes, CAUTIOUS)
    wanted = max(rows_that_hide_gathers(one, policy, peaks) for policy in policies)
    # A row holds a sample or more; further rows would stay empty.
    wanted = min(wanted, max(config.batch_size // (sizes["data"] * sizes["fsdp"]), 1))
    given = config.run.rows_per_shard
    ordered: list[tuple[tuple[float, int, float], Execution]] = []
    for choice in itertools.starmap(
        Execution,
        itertools.product(policies, [given] if given else range(1, wanted + 1), resident),
    ):
        batch = micro_batch(config, sizes, choice)
        planned = resident[choice.frozen] + working_bytes(batch, choice.remat)
        if planned <= (1 - RESERVE) * available:
            seconds = micro_batch_seconds(batch, choice.remat, peaks) / choice.rows_per_shard
            preferred = list(resident).index(choice.frozen)
            ordered.append(((seconds, preferred, planned), choice))
    ordered.sort(key=lambda each: each[0])
    least = Execution(policies[-1], given or 1, min(resident, key=resident.__getitem__))
    return list(dict.fromkeys([*(choice for _, choice in ordered), least]))


def layouts(config: TrainConfig, mesh: Mesh) -> list[Frozen]:
    """Where the frozen weights may be, what the devices prefer first."""
    if config.run.frozen != "auto":
        return [config.run.frozen]
    if tuning.training(mesh).replicates_frozen and mesh.shape["fsdp"] > 1:
        return ["replicated", "sharded"]
    return ["sharded"]


def micro_batch(config: TrainConfig, sizes: Mapping[str, int], chosen: Execution) -> MicroBatch:
    """A micro-batch of a run as the cost model sees it."""
    return MicroBatch(
        config.sizes.text,
        rank=0 if config.adapter is None else config.adapter.rank,
        rows=chosen.rows_per_shard,
        length=config.row_length,
        logit_positions=min(LOGIT_POSITIONS, config.row_length),
        fsdp=sizes["fsdp"],
        tensor=sizes["tensor"],
        replicated=chosen.frozen == "replicated",
    )


def resident_bytes(config: TrainConfig, mesh: Mesh) -> dict[Frozen, int]:
    """Bytes per device of weights, optimizer, gradient sums and the visual tokens of two batches,
    by where the frozen weights are, in the order of `layouts`."""
    return {
        frozen: _resident_bytes(fixed(config, dataclasses.replace(CAUTIOUS, frozen=frozen)), mesh)
        for frozen in layouts(config, mesh)
    }


def _resident_bytes(config: TrainConfig, mesh: Mesh) -> int:
    with use_mesh(mesh):
        objective = make_objective(config)
    _, state, frozen = abstract_step(config, objective, mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = abstract_rows(config, shards, config.row_length)
    visual = placed(rows.visual_tokens, NamedSharding(mesh, logical_spec("batch")))
    # The gradient sums are as large as the trained weights.
    return bytes_per_device((state, state.trained, frozen, visual, visual))


def make_step(config: TrainConfig, objective: Objective, mesh: Mesh, total_steps: int) -> TrainStep:
    """The step of a run of this length; the configuration leaves nothing open."""
    optimizer = make_optimizer(config.optimizer, total_steps, objective.learning_rates)
    shardings = objective.module.shardings(mesh)
    options = None
    if config.run.xla_options:
        options = tuning.micro_batch_options(mesh, execution(config).frozen)
    return TrainStep(
        objective.loss,
        optimizer,
        seed=config.seed,
        shardings=state_shardings(optimizer, objective.trained(), shardings, mesh),
        compiler_options=options,
    )


def abstract_step(
    config: TrainConfig, objective: Objective, mesh: Mesh
) -> tuple[TrainStep, Any, Shapes]:
    """The step, its state and the frozen weights, all as shapes with shardings."""
    # The length of the run is in the schedule alone; no shape depends on it.
    step = make_step(config, objective, mesh, total_steps=1000)
    return step, step.abstract_state(objective.trained()), abstract_frozen(config, objective, mesh)


def abstract_frozen(config: TrainConfig, objective: Objective, mesh: Mesh) -> Shapes:
    """The frozen weights as shapes with shardings; the configuration leaves nothing open."""
    shardings = shardings_of(config, objective, mesh)
    return {
        path: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shardings[path])
        for path, shape in objective.frozen().items()
    }


def shardings_of(config: TrainConfig, objective: Objective, mesh: Mesh) -> dict[str, NamedSharding]:
    """The sharding of every weight of a run; the configuration leaves nothing open."""
    shardings = objective.module.shardings(mesh)
    if config.run.frozen == "replicated":
        shardings |= {path: without_axis(shardings[path], "fsdp") for path in objective.frozen()}
    return shardings


def _chosen(config: TrainConfig, mesh: Mesh, device: jax.Device) -> tuple[Execution, str]:
    """The execution on devices of this kind, and the reason for it."""
    available = _memory(device)
    if available is None:
        return CAUTIOUS, f"the memory of a {device.device_kind} is not known"
    sizes, resident = dict(mesh.shape), resident_bytes(config, mesh)
    chosen = choices(config, resident, sizes, _chip(device), available)[0]
    working = working_bytes(micro_batch(config, sizes, chosen), chosen.remat)
    gib, of = (resident[chosen.frozen] + working) / 2**30, available / 2**30
    reason = f"{gib:.1f} of {of:.1f} GiB per device planned, {100 * RESERVE:.0f} % are kept free"
    return chosen, reason


def _chip(device: jax.Device) -> Chip | None:
    """Peaks of a device, where it is a known TPU."""
    kinds = {chip.tpu.kind: chip for chip in CHIPS.values() if chip.tpu is not None}
    return kinds.get(device.device_kind)


def _memory(device: jax.Device) -> float | None:
    """Bytes that a program may use on a device; None where they are not known.

    A device of another process does not tell; the first process's choice counts.
    """
    chip = _chip(device)
    if chip is not None and chip.tpu is not None:
        return chip.tpu.memory
    if device.process_index != jax.process_index():
        device = jax.local_devices()[0]
    statistics = device.memory_stats() or {}
    return statistics.get("bytes_limit")
