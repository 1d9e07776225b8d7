"""What inference needs of a TPU slice: its jitted functions compiled, not run.

No weights, images or TPU are needed. `decode` is one step of all slots; how many follow is unknown.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prumerge_jax.aot.assumptions import MeanTokens, mean_visual_tokens
from prumerge_jax.aot.compile import (
    CAVEAT,
    Program,
    Sizes,
    bytes_per_chip,
    compile_program,
    decoder_kernel_flops,
    first_that_fits,
    memory_line,
    peak_bytes,
    program_lines,
    tower_kernel_flops,
)
from prumerge_jax.aot.topology import Topology
from prumerge_jax.cost import counts
from prumerge_jax.cost.roofline import Operation
from prumerge_jax.engine import programs
from prumerge_jax.engine.shapes import EngineConfig, EngineShapes, fit
from prumerge_jax.models.attention.splash import splash_pairs
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.llava import abstract_model
from prumerge_jax.reductions import Reduction, parse
from prumerge_jax.sharding.mesh import (
    logical_spec,
    mesh_on,
    replicated,
    use_mesh,
    weight_shardings,
)

ASSUMED_TEXT_TOKENS, ASSUMED_NEW_TOKENS = 60, 64
"""Tokens of a question and of its answer, where the engine's lengths are left open."""


@dataclasses.dataclass(frozen=True)
class InferencePlan:
    """An engine on a slice.

    Attributes:
      topology: the slice.
      mesh: sizes of the mesh's axes.
      reduction: its spelling.
      dtype: dtype of weights and computation.
      visual_tokens: assumed mean per image.
      shapes: shapes of the programs.
      programs: encode, read (scoring), prefill and decode, one run each.
      work: by program, what it computes on all chips together, by the cost model.
      resident: bytes per chip of weights, KV slots and four windows of visual tokens.
      rejected: why meshes that were tried before this one do not fit.
    """

    topology: Topology
    mesh: Sizes
    reduction: str
    dtype: jnp.dtype
    visual_tokens: MeanTokens
    shapes: EngineShapes
    programs: tuple[Program, ...]
    work: Mapping[str, Operation]
    resident: int
    rejected: tuple[str, ...] = ()

    @property
    def memory(self) -> int:
        """Peak bytes per chip: what is resident, and the largest working set of a program."""
        return peak_bytes(self.resident, self.programs)

    @property
    def prompts(self) -> float:
        """Number of prompts of the assumed length that full rows hold."""
        length = self.visual_tokens.mean + ASSUMED_TEXT_TOKENS
        return self.shapes.prefill_rows * self.shapes.row_length / length

    def lines(self) -> list[str]:
        """The plan as lines of text."""
        chip = self.topology.chip
        used = 1
        for size in self.mesh.values():
            used *= size
        lines = [
            f"{self.topology.name}: {used} of {len(self.topology.devices)} chips, mesh "
            + " ".join(f"{axis}={size}" for axis, size in self.mesh.items()),
            *(f"  rejected: {reason}" for reason in self.rejected),
            f"{self.reduction} in {self.dtype}, assumed {self.visual_tokens.mean:.4g} visual "
            f"tokens per image ({self.visual_tokens.reason}) and {ASSUMED_TEXT_TOKENS} of text: "
            f"{self.prompts:.0f} prompts in the rows of a read or prefill",
            f"{self.shapes.batch_size} images, {self.shapes.prefill_rows} rows of "
            f"{self.shapes.row_length}, {self.shapes.slots} slots of {self.shapes.cache_length}",
            memory_line(self.memory, self.resident, chip),
            *program_lines([(program, 1) for program in self.programs], chip),
            "model TFLOP, roofline of these chips and the share of it that XLA's estimate reaches:",
        ]
        for program in self.programs:
            work = self.work[program.name]
            floor = work.seconds(chip) / used
            lines.append(
                f"  {program.name}: {work.flops / 1e12:.2f} T, {1e3 * floor:.2f} ms "
                f"({work.bound(chip)} bound), {100 * floor / program.seconds(chip):.0f} %"
            )
        return [*lines, CAVEAT]


def plan_inference(
    model: LlavaConfig,
    engine: EngineConfig,
    reduction: str,
    topology: Topology,
    mesh: Sizes,
    dtype: jnp.dtype = jnp.bfloat16,
) -> InferencePlan:
    """Compiles an engine's programs for a slice, on this mesh or the next larger that fits.

    Args:
      model: sizes.
      engine: shapes of the jitted functions; lengths that it leaves open are fitted to short
        questions.
      reduction: spelling of what happens to the visual tokens.
      topology: the slice.
      mesh: sizes of the mesh's axes; those that are tried next have more `tensor`.
      dtype: dtype of weights and computation.

    Raises:
      ValueError: the mesh is larger than the slice, a shape does not divide over its shards, or
        the reduction is not valid.
      DoesNotFit: no mesh of the slice has the memory.
    """
    shapes = fit(
        engine,
        parse(reduction),
        _resized(model, parse(reduction)).vision.num_patches,
        np.array([ASSUMED_TEXT_TOKENS]),
        max_new_tokens=ASSUMED_NEW_TOKENS,
        max_positions=model.text.max_positions,
        shards=mesh["data"] * mesh["fsdp"],
    )
    plan, rejected = first_that_fits(
        _larger(mesh, model, len(topology.devices)),
        functools.partial(_plan, model, shapes, reduction, topology, jnp.dtype(dtype)),
        topology,
        "has the memory; make the engine's shapes smaller or take a larger slice",
    )
    return dataclasses.replace(plan, rejected=rejected)


def _resized(model: LlavaConfig, reduction: Reduction) -> LlavaConfig:
    """The model with images of the size that a reduction wants."""
    side = reduction.image_size(model.vision.image_size, model.vision.patch_size)
    return dataclasses.replace(model, vision=dataclasses.replace(model.vision, image_size=side))


def _larger(mesh: Sizes, model: LlavaConfig, devices: int) -> Iterator[dict[str, int]]:
    """This mesh, and those with 2, 4, ... times its tensor parallelism."""
    sizes = dict(mesh)
    yield dict(sizes)
    while True:
        sizes["tensor"] *= 2
        fits = sizes["data"] * sizes["fsdp"] * sizes["tensor"] <= devices
        if not fits or model.text.num_kv_heads % sizes["tensor"]:
            return
        yield dict(sizes)


def _plan(
    model: LlavaConfig,
    engine: EngineShapes,
    spelling: str,
    topology: Topology,
    dtype: jnp.dtype,
    sizes: Sizes,
) -> InferencePlan:
    mesh = mesh_on(topology.devices, **sizes)
    graphdef, state = _abstract_state(model, mesh, dtype)
    visual_tokens = mean_visual_tokens(spelling, model.vision)
    reduction = parse(spelling)
    model = _resized(model, reduction)
    batch = NamedSharding(mesh, logical_spec("batch"))
    side, capacity = model.vision.image_size, reduction.capacity_for(model.vision.num_patches)
    pixels = jax.ShapeDtypeStruct((engine.batch_size, side, side, 3), jnp.uint8, sharding=batch)
    asked = None
    if reduction.question_tokens:
        shape = (engine.batch_size, reduction.question_tokens)
        asked = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch)
    pool = jax.ShapeDtypeStruct(
        (2 * engine.window_size, capacity, model.vision.width + reduction.weighs_tokens),
        dtype,
        sharding=batch,
    )
    row = jax.ShapeDtypeStruct((engine.prefill_rows, engine.row_length), jnp.int32, sharding=batch)
    rows = programs.Rows(*[row] * 4)  # type: ignore[arg-type]  # shapes stand for arrays
    slots = _abstract_slots(graphdef, state, engine, mesh, dtype)
    with use_mesh(mesh):
        pairs = splash_pairs(
            engine.row_length, causal=True, max_segment_length=engine.longest_prompt
        )
        of_tower = tower_kernel_flops(model.vision, engine.batch_size, dtype) / mesh.size
        of_rows = decoder_kernel_flops(model.text, engine.prefill_rows, pairs, dtype) / mesh.size
        encode = programs.encode.lower(
            graphdef, state, pixels, asked, reduction=reduction, dtype=dtype
        )
        longest = engine.longest_prompt
        read = programs.hidden_before_last_mlp.lower(
            graphdef, state, pool, rows, max_segment_length=longest
        )
        prefill = programs.prefill.lower(graphdef, state, pool, rows, max_segment_length=longest)
        decode = programs.decode.lower(
            graphdef,
            state,
            slots,
            steps=engine.decode_steps_per_call,
        )
        compiled = (
            compile_program("encode", encode, of_tower),
            compile_program("read", read, of_rows),
            compile_program("prefill", prefill, of_rows),
            compile_program("decode", decode),
        )
    return InferencePlan(
        topology,
        sizes,
        spelling,
        dtype,
        visual_tokens,
        engine,
        compiled,
        _work(model, engine),
        resident=bytes_per_chip((state, slots, pool, pool)),
    )


def _abstract_state(
    model: LlavaConfig, mesh: Mesh, dtype: jnp.dtype
) -> tuple[nnx.GraphDef, nnx.State]:
    """A model's structure and its weights as shapes with shardings, as `Llava.load` lays them."""
    graphdef, abstract = abstract_model(model)
    placed = dict(nnx.to_flat_state(weight_shardings(abstract, mesh)))
    return graphdef, nnx.from_flat_state(
        {
            path: leaf.replace(
                jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=placed[path].get_value())
            )
            for path, leaf in nnx.to_flat_state(abstract)
        }
    )


def _abstract_slots(
    graphdef: nnx.GraphDef, state: nnx.State, engine: EngineShapes, mesh: Mesh, dtype: jnp.dtype
) -> programs.Slots:
    """The slots as shapes with shardings."""
    shapes = jax.eval_shape(
        lambda: programs.empty_slots(
            graphdef, state, slots=engine.slots, length=engine.cache_length, dtype=dtype
        )
    )
    cache = NamedSharding(mesh, PartitionSpec(*logical_spec(None, "batch", None, "heads", None)))
    unsharded = replicated(mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=cache if leaf.ndim == 5 else unsharded
        ),
        shapes,
    )


def _pairs(engine: EngineShapes) -> float:
    """Queries and the keys before them that are near enough to be of the same prompt."""
    length, longest = engine.row_length, engine.longest_prompt
    return engine.prefill_rows * (length - longest / 2) * longest


def _work(model: LlavaConfig, engine: EngineShapes) -> dict[str, Operation]:
    """What each program has to compute and to read, by the cost model; rows count as full."""
    sizes, text = counts.parameters(model), model.text
    width = counts.ACTIVATION_BYTES
    positions = engine.prefill_rows * engine.row_length
    flops: float = 2 * counts.block_parameters(text) * positions
    flops += counts.attention_flops(text, _pairs(engine))
    rows = Operation(flops, width * sizes.blocks)
    context = engine.cache_length
    return {
        "encode": Operation(
            engine.batch_size * counts.tower_flops(model.vision), width * sizes.vision_used
        ),
        "read": rows,
        "prefill": rows,
        "decode": Operation(
            engine.slots * counts.decode_flops(text, context),
            width * (sizes.blocks + sizes.head)
            + engine.slots * context * counts.kv_bytes_per_token(text),
        ),
    }
