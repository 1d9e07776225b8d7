"""Plans of inference: what is refused, and what is printed."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from prumerge_jax.aot import engine_programs
from prumerge_jax.aot.assumptions import MeanTokens
from prumerge_jax.aot.compile import Program
from prumerge_jax.aot.held import Held, abstract_weights, quantised_shapes
from prumerge_jax.aot.hlo import ProgramCost
from prumerge_jax.aot.inference import InferencePlan, PlainDecode, plan_inference
from prumerge_jax.aot.topology import Topology
from prumerge_jax.cost import CHIPS, Operation
from prumerge_jax.data.layout import Layout
from prumerge_jax.engine.shapes import EngineConfig, EngineShapes
from prumerge_jax.models import tuning
from prumerge_jax.models.config import LlavaConfig, published
from prumerge_jax.models.quantisation import FORMATS
from prumerge_jax.reductions import parse
from prumerge_jax.sharding.mesh import bytes_per_device, make_mesh
from tests.families import NEXT_VICUNA, ONEVISION_TIED

GIB = 2**30
ONE = {"data": 1, "fsdp": 1, "tensor": 1}
SMALL = EngineConfig(
    batch_size=2,
    window_size=4,
    row_length=128,
    prefill_rows=2,
    slots=2,
    cache_length=128,
    decode_steps_per_call=2,
)


def test_shapes_that_do_not_divide_are_refused_before_anything_is_compiled() -> None:
    slice_of_8 = Topology("v5e:2x4", CHIPS["tpu-v5e"], (None,) * 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size 2 does not divide over the 4 data shards"):
        plan_inference(published("tiny"), SMALL, "prumerge+", slice_of_8, ONE | {"fsdp": 4})


def test_what_a_plan_holds_in_fewer_bits() -> None:
    model, mesh = published("tiny"), make_mesh(1, 1, 2)
    held = Held(jnp.dtype(jnp.bfloat16), FORMATS["int4"], jnp.dtype(jnp.int8))
    with tuning.use(tuning.BY_PLATFORM["tpu"]):
        _, state = abstract_weights(model, mesh, held)
    width, inner = model.text.width, model.text.mlp_width
    assert {(width, inner // 2), (inner // 2, width)} <= quantised_shapes(state, held)
    leaves = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(state)}
    path = ("decoder", "layers", "mlp", "up_proj", "kernel_q")
    assert bytes_per_device(leaves[path]) == model.text.num_layers * width * inner // 2 // 2
    of_blocks = Held(held.dtype, FORMATS["nf4"], None)
    with tuning.use(tuning.BY_PLATFORM["tpu"]):
        assert not quantised_shapes(abstract_weights(model, mesh, of_blocks)[1], of_blocks)
    assert (held.bits.kernels, held.bits.cache) == (4, 8)


LENGTHS = {"row_length": 128, "longest_prompt": 128, "cache_length": 128}
SHAPES = EngineShapes(**vars(SMALL.sizes()), **LENGTHS)


@pytest.mark.parametrize(
    ("model", "reduction", "has_edges", "has_taps"),
    [
        (published("tiny"), "prumerge", False, False),
        (NEXT_VICUNA, "prumerge", True, False),
        (NEXT_VICUNA, "full", False, False),
        (ONEVISION_TIED, "full", False, True),
    ],
)
def test_programs_are_those_that_the_engine_runs(
    monkeypatch, model: LlavaConfig, reduction: str, has_edges: bool, has_taps: bool
) -> None:
    """With the mask of patches beside the image, and the taps of shrunk mosaics."""
    monkeypatch.setattr(engine_programs, "compile_program", lambda name, lowered, *_, **__: lowered)
    mesh, held = make_mesh(), Held(jnp.dtype(jnp.float32), None, None)
    weights = abstract_weights(model, mesh, held)
    visual = MeanTokens(8.0, "")
    of = engine_programs.EnginePrograms(
        weights, model, SHAPES, parse(reduction), mesh, held, visual, shares_prefixes=False
    )

    def inputs(lowered: jax.stages.Lowered) -> set[tuple[tuple[int, ...], str]]:
        return {(each.shape, each.dtype.name) for each in jax.tree.leaves(lowered.in_avals)}

    edges = ((SHAPES.batch_size, model.vision.num_patches), "bool")
    taps = ((SHAPES.prefill_rows, SHAPES.row_length, 4), "float32")
    assert (edges in inputs(of.encode())) == has_edges
    assert (taps in inputs(of.read())) == has_taps
    assert of.resident > of.pool_bytes > 0


def program(name: str, cycles: int, open_loops: int = 0) -> Program:
    cost = ProgramCost({}, cycles, open_loops)
    return Program(name, GIB, GIB // 4, GIB // 2, cost, kernel_flops=0.0, compile_seconds=1.0)


def test_the_printed_plan_compares_with_the_floor_of_its_chips() -> None:
    plan = InferencePlan(
        topology=Topology("v5e:2x4", CHIPS["tpu-v5e"], (None,) * 8),  # type: ignore[arg-type]
        mesh=ONE | {"tensor": 2},
        reduction="prumerge+",
        dtype=jnp.dtype(jnp.bfloat16),
        visual_tokens=MeanTokens(68.0, "as it happens"),
        largest=Layout(12),
        shapes=SHAPES,
        # 6 and 3 million cycles at 1.5 GHz
        programs=(program("read", 6_000_000), program("decode", 3_000_000, open_loops=1)),
        work={"read": Operation(197e9 * 4, 0.0), "decode": Operation(0.0, 0.819e9 * 2)},
        resident=2 * GIB,
        pool_bytes=GIB,
        sequence_bytes=GIB // 8,
        quantize="int8",
        cache_dtype="int8",
        plain=PlainDecode(program("decode", 6_000_000), "", Operation(0.0, 0.819e9 * 3)),
        rejected=("tensor=1: too large",),
    )
    assert plan.memory == 2 * GIB + GIB // 2 + GIB // 4
    lines = plan.lines()
    text = "\n".join(lines)
    more = ("prumerge+", "bfloat16", "68", "60", "as it happens")
    for part in ("data=1 fsdp=1 tensor=2", "tensor=1: too large", "2.75", "15.75", "2.00", *more):
        assert part in text, part
    # 15.75 - (2.75 - 1) GiB
    assert plan.sequences == 112
    assert "room for the keys and values of 112 sequences of 150 tokens" in text
    assert "kernels in int8, keys and values in int8" in text
    assert "no program holds a bfloat16 copy of a quantised kernel" in text
    against = "all in bfloat16 4.0 ms, 2.00 times as long; roofline 1.0 and 1.5 ms, 1.50 times"
    assert f"a step of decoding: 2.0 ms, {against}" in text
    short = plan.plain._replace(program=None, reason="decode needs 26G of 15.75G")
    text = "\n".join(dataclasses.replace(plan, plain=short).lines())
    assert "all in bfloat16 does not fit: decode needs 26G of 15.75G; roofline" in text
    assert sum("(of 1 steps)" in line for line in lines) == 1
    read, decode = (next(line for line in lines if f"{p}: " in line and "bound" in line)
                    for p in ("read", "decode"))  # fmt: skip
    assert re.findall(r"[\d.]+", read) == ["0.79", "2.00", "50"]
    assert "compute bound" in read
    assert re.findall(r"[\d.]+", decode) == ["0.00", "1.00", "50"]
    assert "memory bound" in decode
