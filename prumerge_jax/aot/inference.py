"""What inference needs of a TPU slice: its jitted functions compiled, not run.

No weights, images or TPU are needed. `decode` is one step of all slots, with its part of what a
call of several steps does once. Its sequences have the assumed mean of visual tokens, the question,
and half of the answer.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from prumerge_jax.aot.assumptions import (
    ASSUMED_NEW_TOKENS,
    ASSUMED_TEXT_TOKENS,
    MeanTokens,
    crops_of_image,
    decoded_tokens,
    largest_layout,
    mean_of_image,
)
from prumerge_jax.aot.compile import (
    CAVEAT,
    DoesNotFit,
    Program,
    Sizes,
    first_that_fits,
    memory_line,
    peak_bytes,
    program_lines,
    tpu,
)
from prumerge_jax.aot.engine_programs import EnginePrograms
from prumerge_jax.aot.held import Held, abstract_weights
from prumerge_jax.aot.topology import Topology
from prumerge_jax.cost import counts
from prumerge_jax.cost.bits import PLAIN, Bits
from prumerge_jax.cost.roofline import FRONT_TOKENS, Operation, Workload
from prumerge_jax.data.layout import Layout
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.engine.encoding import resized
from prumerge_jax.engine.request import Opening
from prumerge_jax.engine.shapes import EngineConfig, EngineShapes, fit, most_visual_tokens
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.quantisation import format_named, named_cache_dtype
from prumerge_jax.models.quantised_weights import check_blocks
from prumerge_jax.models.tuning import BY_PLATFORM
from prumerge_jax.reductions import Stage, parse
from prumerge_jax.sharding.mesh import mesh_on

SEQUENCE_TOKENS = 150
"""Tokens of the sequences that a plan counts the room for: question, 40 visual tokens, answer."""
ASSUMED_IMAGES = 8
"""Images whose questions rows are made for."""


class PlainDecode(NamedTuple):
    """A step of decoding with kernels, keys and values in the dtype of computation.

    Attributes:
      program: compiled for the same mesh; None where that does not have the memory.
      reason: why it has not.
      work: by the cost model, on all chips together.
    """

    program: Program | None
    reason: str
    work: Operation


@dataclasses.dataclass(frozen=True)
class InferencePlan:
    """An engine on a slice.

    Attributes:
      topology: the slice.
      mesh: sizes of the mesh's axes.
      reduction: its spelling.
      dtype: dtype of weights and computation.
      visual_tokens: assumed mean per image.
      largest: the layout of most visual tokens, which the shapes have room for.
      shapes: shapes of the programs.
      programs: encode, read (scoring), prefill and decode, one run each.
      work: by program, what it computes on all chips together, by the cost model.
      resident: bytes per chip of weights, pages of keys and values, and four windows of visual
        tokens.
      pool_bytes: of it, those of the pages.
      sequence_bytes: bytes per chip of the keys and values of one sequence of
        `SEQUENCE_TOKENS`, in pages.
      quantize, cache_dtype: format of the decoder's kernels and dtype of keys and values; None for
        `dtype`.
      plain: what a step of decoding would be without them; None where neither is set.
      questions_per_image: assumed number of questions that share what is in front of them.
      rejected: why meshes that were tried before this one do not fit.
    """

    topology: Topology
    mesh: Sizes
    reduction: str
    dtype: jnp.dtype
    visual_tokens: MeanTokens
    largest: Layout
    shapes: EngineShapes
    programs: tuple[Program, ...]
    work: Mapping[str, Operation]
    resident: int
    pool_bytes: int
    sequence_bytes: int
    quantize: str | None = None
    cache_dtype: str | None = None
    plain: PlainDecode | None = None
    questions_per_image: int = 1
    rejected: tuple[str, ...] = ()

    @property
    def memory(self) -> int:
        """Peak bytes per chip: what is resident, and the largest working set of a program."""
        return peak_bytes(self.resident, self.programs)

    @property
    def sequences(self) -> int:
        """Sequences of `SEQUENCE_TOKENS` per chip that have room for their keys and values."""
        others = self.memory - self.pool_bytes
        return max(int((tpu(self.topology.chip).memory - others) // self.sequence_bytes), 0)

    @property
    def prompts(self) -> float:
        """Number of prompts of the assumed length that full rows hold."""
        workload = Workload(
            self.visual_tokens.mean,
            ASSUMED_TEXT_TOKENS,
            questions_per_image=self.questions_per_image,
        )
        return self.shapes.prefill_rows * self.shapes.row_length / workload.computed

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
            f"{self.reduction} in {self.dtype}"
            + (f", kernels in {self.quantize}" if self.quantize else "")
            + (f", keys and values in {self.cache_dtype}" if self.cache_dtype else "")
            + f", assumed {self.visual_tokens.mean:.4g} visual "
            f"tokens per image ({self.visual_tokens.reason}), {self.questions_per_image} "
            f"question(s) about each and {ASSUMED_TEXT_TOKENS} tokens of text: "
            f"{self.prompts:.0f} prompts in the rows of a read or prefill",
            f"the largest image: {self.largest.num_crops} crop(s), "
            f"{most_visual_tokens(parse(self.reduction), self.largest)} visual tokens at most",
            f"{self.shapes.batch_size} crops, {self.shapes.prefill_rows} rows of "
            f"{self.shapes.row_length}, {self.shapes.slots} slots with "
            f"{decoded_tokens(self.visual_tokens):.4g} tokens each, {self.shapes.pool_pages} pages "
            f"of {self.shapes.page_size}, for sequences of up to {self.shapes.cache_length}",
            memory_line(self.memory, self.resident, chip),
            f"room for the keys and values of {self.sequences} sequences of {SEQUENCE_TOKENS} "
            "tokens per chip, those of the pool included",
            *self._copies(),
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
        return [*lines, *self._against_plain(used), CAVEAT]

    def _against_plain(self, used: int) -> list[str]:
        """A step of decoding in fewer bits and in the dtype of computation, on `used` chips."""
        if self.plain is None:
            return []
        chip = self.topology.chip
        program = next(each for each in self.programs if each.name == "decode")
        step, floor = program.seconds(chip), self.work["decode"].seconds(chip) / used
        plain_floor = self.plain.work.seconds(chip) / used
        text = f"a step of decoding: {1e3 * step:.1f} ms, all in {self.dtype} "
        if self.plain.program is None:
            text += f"does not fit: {self.plain.reason}"
        else:
            plain = self.plain.program.seconds(chip)
            text += f"{1e3 * plain:.1f} ms, {plain / step:.2f} times as long"
        return [
            f"{text}; roofline {1e3 * floor:.1f} and {1e3 * plain_floor:.1f} ms, "
            f"{plain_floor / floor:.2f} times"
        ]

    def _copies(self) -> list[str]:
        """What was checked of quantised kernels."""
        if self.quantize is None:
            return []
        if format_named(self.quantize).block:
            return [f"{self.quantize} kernels are expanded to {self.dtype} in memory, one by one"]
        return [f"no program holds a {self.dtype} copy of a quantised kernel"]


def plan_inference(
    model: LlavaConfig,
    engine: EngineConfig,
    reduction: str,
    topology: Topology,
    mesh: Sizes,
    dtype: jnp.dtype = jnp.bfloat16,
    *,
    questions_per_image: int = 1,
    quantize: str | None = None,
    cache_dtype: str | None = None,
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
      questions_per_image: how many questions share the text and the image in front of them.
      quantize: format of the decoder's kernels, None for `dtype`.
      cache_dtype: dtype of keys and values, `int8` or None for `dtype`.

    Raises:
      ValueError: the mesh is larger than the slice, a shape does not divide over its shards, or
        the reduction is not valid.
      DoesNotFit: no mesh of the slice has the memory.
      CopiesWeights: a program holds a quantised kernel in 16 bits.
    """
    held = Held(
        jnp.dtype(dtype),
        None if quantize is None else format_named(quantize),
        named_cache_dtype(cache_dtype),
    )
    page_size = engine.page_size or BY_PLATFORM["tpu"].page_size
    sized = resized(model, parse(reduction))
    shapes = fit(
        dataclasses.replace(engine, page_size=page_size),
        parse(reduction),
        sized.vision.num_patches,
        _openings(questions_per_image, largest_layout(sized, parse(reduction))),
        max_new_tokens=ASSUMED_NEW_TOKENS,
        max_positions=model.text.max_positions,
        shards=mesh["data"] * mesh["fsdp"],
    )
    asked = _Asked(
        model, shapes, reduction, topology, held, questions_per_image, engine.pages is None
    )
    plan, rejected = first_that_fits(
        _larger(mesh, model, len(topology.devices)),
        functools.partial(_plan, asked),
        topology,
        "has the memory; make the engine's shapes smaller or take a larger slice",
    )
    plain = None if held.bits == PLAIN else _plain_decode(asked, plan)
    return dataclasses.replace(plan, rejected=rejected, plain=plain)


class _Asked(NamedTuple):
    """What is planned, whatever the mesh.

    Attributes:
      model: sizes, with native images.
      shapes: of the engine.
      reduction: its spelling.
      topology: the slice.
      held: in what the model is held.
      questions_per_image: how many share what is in front of them.
      fits_pages: whether there are no more pages than a chip has the memory for.
    """

    model: LlavaConfig
    shapes: EngineShapes
    reduction: str
    topology: Topology
    held: Held
    questions_per_image: int
    fits_pages: bool

    @property
    def shares_prefixes(self) -> bool:
        """Whether rows have branches."""
        return self.questions_per_image > 1 and self.shapes.share_prefixes

    def programs(self, sizes: Sizes, held: Held) -> EnginePrograms:
        """The programs on a mesh of these sizes."""
        mesh, reduction = mesh_on(self.topology.devices, **sizes), parse(self.reduction)
        check_blocks(self.model.text, held.quantize, mesh.shape)
        return EnginePrograms(
            abstract_weights(self.model, mesh, held),
            resized(self.model, reduction),
            self.shapes,
            reduction,
            mesh,
            held,
            mean_of_image(self.reduction, self.model, crops_of_image(self.model)),
            self.shares_prefixes,
        )


def _openings(questions_per_image: int, layout: Layout) -> list[Opening]:
    """Questions about a few images, with text in front of the image as a chat template has it."""
    openings = []
    for number in range(ASSUMED_IMAGES * questions_per_image if questions_per_image > 1 else 1):
        image = number // questions_per_image
        behind = ASSUMED_TEXT_TOKENS - FRONT_TOKENS
        token_ids = [*[1] * FRONT_TOKENS, IMAGE_TOKEN, *[2 + number] * behind]
        openings.append(Opening(np.array(token_ids), (image,), (layout,)))
    return openings


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


def _plan(asked: _Asked, sizes: Sizes) -> InferencePlan:
    held = asked.held
    runs = asked.programs(sizes, held)
    if asked.fits_pages:
        runs = runs.within(tpu(asked.topology.chip).memory)
    compiled = (runs.encode(), runs.read(), runs.prefill(), runs.decode())
    stages = counts.stages_of(runs.model.vision, runs.reduction)
    shards = sizes["data"] * sizes["fsdp"]
    sequence_pages = -(-SEQUENCE_TOKENS // runs.shapes.page_size)
    return InferencePlan(
        asked.topology,
        sizes,
        asked.reduction,
        held.dtype,
        runs.visual_tokens,
        largest_layout(runs.model, runs.reduction),
        runs.shapes,
        compiled,
        _work(runs.model, runs.shapes, runs.visual_tokens, held.bits, stages),
        resident=runs.resident,
        pool_bytes=runs.pool_bytes,
        sequence_bytes=runs.pool_bytes * shards * sequence_pages // runs.shapes.pool_pages,
        quantize=None if held.quantize is None else held.quantize.name,
        cache_dtype=None if held.cache_dtype is None else held.cache_dtype.name,
        questions_per_image=asked.questions_per_image if asked.shares_prefixes else 1,
    )


def _plain_decode(asked: _Asked, plan: InferencePlan) -> PlainDecode:
    """On the mesh of a plan, with its shapes but for pages that do not fit."""
    asked = asked._replace(shapes=plan.shapes)
    runs = asked.programs(plan.mesh, Held(plan.dtype, None, None))
    runs = runs.within(tpu(asked.topology.chip).memory)
    work = _work(runs.model, runs.shapes, runs.visual_tokens, PLAIN, ())["decode"]
    try:
        return PlainDecode(runs.decode(), "", work)
    except DoesNotFit as error:
        return PlainDecode(None, str(error).rstrip("."), work)


def _pairs(engine: EngineShapes) -> float:
    """Queries and the keys before them that are near enough to be of the same prompt."""
    length, longest = engine.row_length, engine.longest_prompt
    return engine.prefill_rows * (length - longest / 2) * longest


def _work(
    model: LlavaConfig,
    engine: EngineShapes,
    visual: MeanTokens,
    bits: Bits,
    stages: tuple[Stage, ...],
) -> dict[str, Operation]:
    """What each program has to compute and to read, by the cost model; rows count as full."""
    sizes, text = counts.parameters(model), model.text
    width = counts.ACTIVATION_BYTES
    positions = engine.prefill_rows * engine.row_length
    flops: float = 2 * counts.block_parameters(text) * positions
    flops += counts.attention_flops(text, _pairs(engine))
    of_blocks = 2 * counts.block_parameters(text) * counts.int8_share(text, bits)
    rows = Operation(flops, sizes.blocks * bits.kernels / 8, of_blocks * positions)
    context = decoded_tokens(visual)
    return {
        "encode": Operation(
            engine.batch_size * counts.staged_tower_flops(model.vision, stages),
            width * sizes.vision_used,
        ),
        "read": rows,
        "prefill": rows,
        "decode": Operation(
            engine.slots * counts.decode_flops(text, context),
            counts.decoder_bytes(model, bits)
            + engine.slots * context * counts.kv_bytes_per_token(text, bits),
            engine.slots * of_blocks,
        ),
    }
