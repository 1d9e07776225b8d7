"""What a training step needs of a TPU slice: compiled, not run.

No weights, data or TPU are needed. How many micro-batches a step has depends on the tokens of its
samples, which only the data can tell; a plan assumes their mean.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import ml_collections
from jax.sharding import Mesh, NamedSharding

from prumerge_jax.aot.assumptions import crops_of_image, mean_of_image
from prumerge_jax.aot.compile import (
    DoesNotFit,
    Program,
    Sizes,
    candidates,
    compile_program,
    decoder_kernel_flops,
    first_that_fits,
    memory_line,
    peak_bytes,
    program_lines,
    tower_kernel_flops,
    tpu,
)
from prumerge_jax.aot.topology import Topology
from prumerge_jax.cost import counts
from prumerge_jax.models.attention.splash import splash_pairs
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.quantisation import format_named
from prumerge_jax.models.quantised_weights import check_blocks
from prumerge_jax.models.tuning import Frozen
from prumerge_jax.sharding.mesh import logical_spec, mesh_on, placed, use_mesh
from prumerge_jax.training.batches import RowShape
from prumerge_jax.training.config import TrainConfig, parse, with_sizes
from prumerge_jax.training.fit import (
    RESERVE,
    Execution,
    abstract_frozen,
    abstract_step,
    choices,
    fixed,
    resident_bytes,
)
from prumerge_jax.training.objectives.next_token import (
    abstract_rows,
    crops_per_part,
    lower_encoder,
    row_shape,
)
from prumerge_jax.training.objectives.registry import make_objective
from prumerge_jax.training.run import fitted_sizes
from prumerge_jax.training.weights import load_pretrained

ASSUMED_TEXT_TOKENS = 200
"""Mean number of text tokens per sample; lengths vary widely with the data."""
SCHEDULED = (
    "(compiled, not run: XLA's cycle estimates, kernels and links at their peaks, "
    "collectives overlapped as its schedule has them)"
)
"""The last line of a plan."""
PACKING_OVERHEAD = 1.02
"""Computed positions per real token where rows are packed."""


@dataclasses.dataclass(frozen=True)
class Samples:
    """What the samples of a step are assumed to be.

    Attributes:
      count: the global batch.
      visual_tokens, text_tokens: means per sample.
      source: where the mean of the visual tokens is from, for the printed plan.
      crops: mean per sample.
    """

    count: int
    visual_tokens: float
    text_tokens: float
    source: str = ""
    crops: int = 1

    @property
    def tokens(self) -> float:
        """Number of tokens of all samples together."""
        return self.count * (self.visual_tokens + self.text_tokens)


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """A step on a slice.

    Attributes:
      topology: the slice.
      model: sizes.
      mesh: sizes of the mesh's axes.
      samples: assumptions about the data.
      execution: rematerialisation, rows and place of the frozen weights, chosen where the
        configuration leaves them open.
      row_length: positions of a row.
      lora_rank: rank of the adapters, 0 without.
      encode: the tower and the reduction, of `crops_per_part` crops on all chips.
      crops_per_part: crops of all data shards that are encoded at a time.
      accumulate: one micro-batch, forward and backward, by the length of its rows.
      update: the optimizer, once per step.
      resident: bytes per chip of weights, optimizer, gradient sums and visual tokens.
      rejected: why meshes that were tried before this one do not fit.
    """

    topology: Topology
    model: LlavaConfig
    mesh: Sizes
    samples: Samples
    execution: Execution
    row_length: int
    lora_rank: int
    encode: Program
    crops_per_part: int
    accumulate: Mapping[int, Program]
    update: Program
    resident: int
    rejected: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of a micro-batch, over all chips."""
        return self.mesh["data"] * self.mesh["fsdp"] * self.execution.rows_per_shard

    @property
    def row_lengths(self) -> list[int]:
        """The length of the rows of each micro-batch of a step."""
        return row_lengths(self.samples, RowShape(self.rows, self.row_length))

    @property
    def filled(self) -> float:
        """Share of a step's positions that hold a token; what is empty is computed too."""
        return self.samples.tokens / (self.rows * sum(self.row_lengths))

    @property
    def programs(self) -> list[tuple[Program, int]]:
        """The programs of a step and how often each runs."""
        micro_batches = collections.Counter(self.row_lengths)
        counted = [(self.accumulate[length], runs) for length, runs in micro_batches.items()]
        parts = math.ceil(self.samples.count * self.samples.crops / self.crops_per_part)
        return [(self.encode, parts), *counted, (self.update, 1)]

    @property
    def memory(self) -> int:
        """Peak bytes per chip: what is resident, and the largest working set of a program."""
        return peak_bytes(self.resident, (program for program, _ in self.programs))

    @property
    def model_flops(self) -> Mapping[str, float]:
        """Model FLOPs of a step over all chips, by component, without recomputation."""
        flops = counts.training_flops(
            self.model,
            self.samples.visual_tokens,
            self.samples.text_tokens,
            self.lora_rank,
            self.samples.crops,
        )
        return {component: self.samples.count * value for component, value in flops.items()}

    @property
    def seconds(self) -> float:
        """Estimated time of a step; its programs run one after the other."""
        return sum(runs * p.scheduled_seconds(self.topology.chip) for p, runs in self.programs)

    @property
    def utilisation(self) -> float:
        """Model FLOPs over what the chips could do in the estimated time."""
        peak = len(self.topology.devices) * self.topology.chip.flops
        return sum(self.model_flops.values()) / (peak * self.seconds)

    def lines(self) -> list[str]:
        """The plan as lines of text."""
        chip, samples, chosen = self.topology.chip, self.samples, self.execution
        flops = {name: value / 1e12 for name, value in self.model_flops.items()}
        source = f" ({samples.source})" if samples.source else ""
        return [
            f"{self.topology.name}: {len(self.topology.devices)} chips, mesh "
            + " ".join(f"{axis}={size}" for axis, size in self.mesh.items()),
            *(f"  rejected: {reason}" for reason in self.rejected),
            f"global batch {samples.count}, assumed {samples.visual_tokens:.4g} visual and "
            f"{samples.text_tokens:g} text tokens per sample{source}, packed at "
            f"{PACKING_OVERHEAD}: micro-batches of {self.rows} rows of "
            f"{' + '.join(map(str, self.row_lengths))} positions, "
            f"{100 * self.filled:.0f} % of them real",
            f"remat {chosen.remat}, {chosen.rows_per_shard} rows of {self.row_length} tokens per "
            f"data shard, frozen weights {chosen.frozen}",
            memory_line(self.memory, self.resident, chip),
            *program_lines(self.programs, chip),
            f"model FLOPs of a step {sum(flops.values()):.0f} T: "
            + ", ".join(f"{name} {value:.0f}" for name, value in flops.items()),
            f"estimated step {1e3 * self.seconds:.0f} ms, {samples.count / self.seconds:.1f} "
            f"samples/s, model FLOPs utilisation {100 * self.utilisation:.0f} %",
            SCHEDULED,
        ]


def row_lengths(samples: Samples, shape: RowShape) -> list[int]:
    """The length of the rows of each micro-batch that these samples take, evenly over all rows."""
    tokens = math.ceil(PACKING_OVERHEAD * samples.tokens / shape.rows)
    full, rest = divmod(tokens, shape.length)
    last = [next(length for length in shape.lengths if length >= rest)] if rest else []
    return [shape.length] * full + last


def plan_training(
    config: ml_collections.ConfigDict,
    topology: Topology,
    samples: Samples | None = None,
    others: Sequence[Samples] = (),
) -> TrainingPlan:
    """Compiles a step for a slice, on the mesh of the configuration or the next that fits.

    Args:
      config: one of `configs/`, with the next-token objective.
      topology: the slice.
      samples: by default `assumed_samples`.
      others: further assumptions that `samples` of the plan may be replaced by.

    Raises:
      ValueError: the configuration cannot be planned, or its mesh does not fit the
        slice.
      DoesNotFit: no mesh of the slice has the memory and divides the batch.
    """
    parsed = parse(config)
    if parsed.objective != "next_token":
        raise ValueError(f"objective is {parsed.objective!r}; plans are for 'next_token'")
    model = load_pretrained(parsed).model if parsed.model is None else parsed.model
    parsed = with_sizes(parsed, model)
    if samples is None:
        samples = assumed_samples(parsed)
    plan, rejected = first_that_fits(
        candidates(fitted_sizes(parsed.run.mesh, model, len(topology.devices))),
        functools.partial(_plan, parsed, topology, [samples, *others]),
        topology,
        "takes this configuration; lower run.rows_per_shard or max_length, change batch_size or "
        "take another slice",
    )
    return dataclasses.replace(plan, rejected=rejected)


def assumed_samples(config: TrainConfig, text_tokens: float = ASSUMED_TEXT_TOKENS) -> Samples:
    """A batch of images with the mean number of visual tokens that the reduction of a configuration
    is assumed to leave; of as many crops as plans assume, or as there is room for."""
    crops = min(crops_of_image(config.sizes), config.room_for_crops)
    visual = mean_of_image(config.reduction, config.sizes, crops)
    source = f"{config.reduction}: {visual.reason}"
    return Samples(config.batch_size, visual.mean, text_tokens, source, crops)


def _plan(
    config: TrainConfig, topology: Topology, samples: Sequence[Samples], sizes: Sizes
) -> TrainingPlan:
    model, chip = config.sizes, topology.chip
    _check_divides(config, sizes)
    mesh = mesh_on(topology.devices, **sizes)
    resident = resident_bytes(config, mesh)
    open_to_it = choices(config, resident, sizes, chip, tpu(chip).memory)
    choice, accumulate, update = _first_that_leaves_the_reserve(
        config, open_to_it, mesh, resident, tpu(chip).memory
    )
    chosen = fixed(config, choice)
    shape = row_shape(chosen, mesh)
    lengths = sorted({length for each in samples for length in row_lengths(each, shape)})
    shorter = {
        length: _micro_batch(chosen, mesh, length)[0] for length in lengths if length < shape.length
    }
    with use_mesh(mesh):
        objective = make_objective(chosen)
        crops = crops_per_part(chosen, sizes["data"] * sizes["fsdp"])
        kernel = tower_kernel_flops(model.vision, crops, objective.dtype) / mesh.size
        lowered = lower_encoder(chosen, abstract_frozen(chosen, objective, mesh), mesh, crops)
        encode = compile_program("encode", lowered, kernel)
    return TrainingPlan(
        topology=topology,
        model=model,
        mesh=sizes,
        samples=samples[0],
        execution=choice,
        row_length=config.row_length,
        lora_rank=0 if config.adapter is None else config.adapter.rank,
        encode=encode,
        crops_per_part=crops,
        accumulate={**shorter, shape.length: accumulate},
        update=update,
        resident=resident[choice.frozen],
    )


def _first_that_leaves_the_reserve(
    config: TrainConfig,
    executions: Sequence[Execution],
    mesh: Mesh,
    resident: Mapping[Frozen, int],
    available: float,
) -> tuple[Execution, Program, Program]:
    """The first of these whose micro-batch does, or else the last, with its programs for a
    micro-batch and the update.

    Raises:
      DoesNotFit: not even the last can be compiled.
    """
    for execution in executions:
        try:
            accumulate, update = _micro_batch(fixed(config, execution), mesh, config.row_length)
        except DoesNotFit:
            if execution is executions[-1]:
                raise
            continue
        if peak_bytes(resident[execution.frozen], [accumulate]) <= (1 - RESERVE) * available:
            break
    with use_mesh(mesh):
        return execution, accumulate, compile_program("update", update)


def _micro_batch(
    config: TrainConfig, mesh: Mesh, length: int
) -> tuple[Program, jax.stages.Lowered]:
    """The program of a micro-batch with rows of this length, and the update, not yet compiled.

    Raises:
      DoesNotFit: as `compile_program`.
    """
    lowered, kernel = _lowered(config, mesh, length)
    name = "accumulate" if length == config.row_length else f"accumulate {length}"
    with use_mesh(mesh):
        return compile_program(name, lowered["accumulate"], kernel), lowered["update"]


def _lowered(
    config: TrainConfig, mesh: Mesh, length: int
) -> tuple[Mapping[str, jax.stages.Lowered], float]:
    """The programs of a step, and the FLOPs of a micro-batch's kernels on a chip."""
    rows = abstract_rows(config, mesh.shape["data"] * mesh.shape["fsdp"], length)
    with use_mesh(mesh):
        objective = make_objective(config)
    # Outside of the mesh: an optimizer makes arrays, which these devices cannot hold.
    step, _, frozen = abstract_step(config, objective, mesh)
    pairs = splash_pairs(length, causal=True)
    # 2 matrix products forward, 3 for dq, 4 for dk and dv. The forward ones are repeated where
    # attention's output is not kept.
    times = 4.5 if config.remat in ("none", "dots") else 5.5
    batch = placed(rows, NamedSharding(mesh, logical_spec("batch")))
    with use_mesh(mesh):
        forward = decoder_kernel_flops(
            config.sizes.text, config.run.rows_per_shard, pairs, objective.dtype
        )
        lowered = step.lower(objective.trained(), frozen, batch)
    return lowered, times * forward / mesh.shape["tensor"]


def _check_divides(config: TrainConfig, sizes: Sizes) -> None:
    shards, tensor = sizes["data"] * sizes["fsdp"], sizes["tensor"]
    if config.batch_size % shards:
        raise DoesNotFit(
            f"batch_size {config.batch_size} is not a multiple of its {shards} data shards"
        )
    heads = config.sizes.text.num_kv_heads
    if heads % tensor:
        raise DoesNotFit(f"{heads} heads do not divide by {tensor}")
    form = None if config.quantize is None else format_named(config.quantize)
    try:
        check_blocks(config.sizes.text, form, sizes)
    except ValueError as error:
        raise DoesNotFit(str(error)) from None
