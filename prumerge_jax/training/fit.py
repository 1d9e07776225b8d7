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
from prumerge_jax.models.remat import REMAT
from prumerge_jax.sharding.mesh import bytes_per_device, logical_spec, placed, use_mesh
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
CAUTIOUS = ("full", 1)
"""Policy and rows per shard where the memory is not known."""


def fitted(
    config: TrainConfig, mesh: Mesh, stored: Mapping[str, Any] | None = None
) -> tuple[TrainConfig, dict[str, Any]]:
    """The configuration with `remat` and `rows_per_shard` for the devices of this job.

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
    is_open = config.remat == "auto" or not config.run.rows_per_shard
    if not is_open:
        remat, rows, reason = *CAUTIOUS, ""
    elif stored is not None and {name: stored.get(name) for name in place} == place:
        remat, rows, reason = stored["remat"], stored["rows_per_shard"], "as this run began"
    else:
        remat, rows, reason = _chosen(config, mesh, device)
    own = fixed(config, remat, rows)
    # Devices may differ in the memory that they leave to a program.
    choice = allgather_ints([REMAT.index(own.remat), own.run.rows_per_shard])[0].tolist()
    remat, rows = REMAT[choice[0]], choice[1]
    if is_open:
        _logger.info("remat %s, %d rows per data shard: %s", remat, rows, reason)
    return fixed(config, remat, rows), {"remat": remat, "rows_per_shard": rows, **place}


def fixed(config: TrainConfig, remat: str, rows: int) -> TrainConfig:
    """The configuration with these where it leaves them open."""
    policy = cast(Any, remat) if config.remat == "auto" else config.remat
    run = dataclasses.replace(config.run, rows_per_shard=config.run.rows_per_shard or rows)
    return dataclasses.replace(config, remat=policy, run=run)


def choices(
    config: TrainConfig,
    resident: int,
    sizes: Mapping[str, int],
    chip: Chip | None,
    available: float,
) -> list[tuple[str, int]]:
    """Policies and rows per shard that fit by the cost model, the fastest first.

    Among equally fast ones the one that needs less memory comes first. The last is what needs
    least, also where it does not fit.

    Args:
      config: model sizes included; what it does not leave open is the same in all.
      resident: see `resident_bytes`.
      sizes: of the mesh.
      chip: peaks of its devices; None where they are not known.
      available: bytes of a device that a program may use.
    """
    policies = CHOICES if config.remat == "auto" else (config.remat,)
    peaks = chip or Chip(1.0, 1.0)  # only ratios of products matter
    one = micro_batch(config, sizes, 1)
    wanted = max(rows_that_hide_gathers(one, policy, peaks) for policy in policies)
    # A row holds a sample or more; further rows would stay empty.
    wanted = min(wanted, max(config.batch_size // (sizes["data"] * sizes["fsdp"]), 1))
    given = config.run.rows_per_shard
    ordered = []
    for remat, rows in itertools.product(policies, [given] if given else range(1, wanted + 1)):
        batch = dataclasses.replace(one, rows=rows)
        planned = resident + working_bytes(batch, remat)
        if planned <= (1 - RESERVE) * available:
            seconds = micro_batch_seconds(batch, remat, peaks) / rows
            ordered.append((seconds, planned, (remat, rows)))
    least = (policies[-1], given or 1)
    return list(dict.fromkeys([*(choice for _, _, choice in sorted(ordered)), least]))


def micro_batch(config: TrainConfig, sizes: Mapping[str, int], rows: int) -> MicroBatch:
    """A micro-batch of a run as the cost model sees it."""
    return MicroBatch(
        config.sizes.text,
        rank=0 if config.adapter is None else config.adapter.rank,
        rows=rows,
        length=config.row_length,
        logit_positions=min(LOGIT_POSITIONS, config.row_length),
        fsdp=sizes["fsdp"],
        tensor=sizes["tensor"],
    )


def resident_bytes(config: TrainConfig, mesh: Mesh) -> int:
    """Bytes per device of weights, optimizer, gradient sums and the visual tokens of two batches.

    They do not depend on what the configuration leaves open.
    """
    config = fixed(config, *CAUTIOUS)
    with use_mesh(mesh):
        objective = make_objective(config)
    _, state, frozen = abstract_step(config, objective, mesh)
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = abstract_rows(config, shards, config.row_length)
    visual = placed(rows.visual_tokens, NamedSharding(mesh, logical_spec("batch")))
    # The gradient sums are as large as the trained weights.
    return bytes_per_device((state, state.trained, frozen, visual, visual))


def abstract_step(
    config: TrainConfig, objective: Objective, mesh: Mesh
) -> tuple[TrainStep, Any, Shapes]:
    """The step, its state and the frozen weights, all as shapes with shardings."""
    shardings = objective.module.shardings(mesh)
    # The length of the run is in the schedule alone; no shape depends on it.
    optimizer = make_optimizer(config.optimizer, 1000, objective.learning_rates)
    of_state = state_shardings(optimizer, objective.trained(), shardings, mesh)
    step = TrainStep(
        objective.loss, optimizer, seed=config.seed, shardings=of_state, overlap=config.run.overlap
    )
    return step, step.abstract_state(objective.trained()), abstract_frozen(objective, mesh)


def abstract_frozen(objective: Objective, mesh: Mesh) -> Shapes:
    """The frozen weights as shapes with shardings."""
    shardings = objective.module.shardings(mesh)
    return {
        path: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shardings[path])
        for path, shape in objective.frozen().items()
    }


def _chosen(config: TrainConfig, mesh: Mesh, device: jax.Device) -> tuple[str, int, str]:
    """Policy, rows and the reason for them on devices of this kind."""
    available = _memory(device)
    if available is None:
        return *CAUTIOUS, f"the memory of a {device.device_kind} is not known"
    sizes, resident = dict(mesh.shape), resident_bytes(config, mesh)
    remat, per_shard = choices(config, resident, sizes, _chip(device), available)[0]
    planned = resident + working_bytes(micro_batch(config, sizes, per_shard), remat)
    gib, of = planned / 2**30, available / 2**30
    reason = f"{gib:.1f} of {of:.1f} GiB per device planned, {100 * RESERVE:.0f} % are kept free"
    return remat, per_shard, reason


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
