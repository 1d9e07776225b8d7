"""Reading HLO: trip counts, asynchronous collectives, bytes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from prumerge_jax.aot.compile import CopiesWeights, Program, check_no_copies
from prumerge_jax.aot.hlo import Traffic, Wait, expanded_codes, program_cost
from prumerge_jax.cost import CHIPS
from prumerge_jax.sharding.mesh import make_mesh

# As XLA writes it for TPUs, shortened: a scan of 32 around an asynchronous all-gather that is named
# in its start, in the fusion it overlaps with and in its end; a kernel's configuration that breaks
# the line; a tuple all-reduce outside.
TPU = """HloModule jit_step, is_scheduled=true

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[]{:T(128)} parameter(0)
  %b = f32[]{:T(128)} parameter(1)
  ROOT %add = f32[]{:T(128)} add(%a, %b)
}

%begin.1 (p: bf16[1,64,512]) -> (bf16[1,64,512], bf16[1,512,512]) {
  %p = bf16[1,64,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %gather.1 = bf16[1,512,512]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=75, dimensions={1}
  ROOT %call.1 = (bf16[1,64,512]{2,1,0}, bf16[1,512,512]{2,1,0}) custom-call(%gather.1)
}

%overlap.1 (p: bf16[1,64,512], w: bf16[256,128]) -> bf16[256,128] {
  %p = bf16[1,64,512]{2,1,0:T(8,128)(2,1)} parameter(0)
  %gather.2 = bf16[1,512,512]{2,1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=75
  ROOT %w = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(1)
}

%body (state: (s32[], bf16[1,64,512], /*index=2*/bf16[256,128])) -> (s32[], bf16[1,64,512]) {
  %state = (s32[]{:T(128)}, bf16[1,64,512]{2,1,0}, /*index=2*/bf16[256,128]{1,0}) parameter(0)
  %weight = bf16[1,64,512]{2,1,0} get-tuple-element(%state), index=1
  %begin = (bf16[1,64,512]{2,1,0}, bf16[1,512,512]{2,1,0}) fusion(%weight), calls=%begin.1
  %kernel = bf16[256,128]{1,0} custom-call(%state), backend_config={"kernel":{
"xprof_metadata":"{\\"block_q\\": 128}"
}}, metadata={op_name="splash"}
  ROOT %fusion.1 = (s32[]{:T(128)}, bf16[1,64,512]{2,1,0}) fusion(%begin, %kernel), \
calls=%overlap.1, backend_config={"estimated_cycles":"1000"}
}

%condition (state: (s32[], bf16[1,64,512], bf16[256,128])) -> pred[] {
  %bound = s32[]{:T(128)} constant(32)
  %state = (s32[]{:T(128)}, bf16[1,64,512]{2,1,0}, bf16[256,128]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

ENTRY %main (x: (s32[], bf16[1,64,512], bf16[256,128])) -> (f32[128], f32[]) {
  %x = (s32[]{:T(128)}, bf16[1,64,512]{2,1,0}, bf16[256,128]{1,0}) parameter(0)
  %loop = (s32[]{:T(128)}, bf16[1,64,512]{2,1,0}) while(%x), condition=%condition, body=%body
  %loss = (f32[128]{0}, f32[]) fusion(%loop), backend_config={"estimated_cycles":"7"}
  ROOT %reduce = (f32[128]{0:T(128)}, f32[]{:T(128)}) all-reduce(%loss), to_apply=%sum
}
"""


def test_a_tpu_program() -> None:
    cost = program_cost(TPU)
    assert cost.collectives == {
        "all-gather": Traffic(32, 32 * 512 * 512 * 2),
        "all-reduce": Traffic(1, 2 * (128 + 1) * 4),
    }
    assert cost.cycles == 32 * 1000 + 7
    assert cost.open_loops == 0


@pytest.mark.parametrize(
    ("inside", "part"),
    [
        ("parameter(1)", "collectives"),  # as it is: it overlaps with one
        ("convolution(%p, %w)", "products"),
        ('convolution(%p, %w), metadata={op_name="jvp(adapter)/dot"}', "adapter"),
        ('add(%p, %w), metadata={op_name="jit(f)/norm/add"}', "collectives"),
    ],
)
def test_cycles_belong_to_the_product_of_a_fusion_or_to_its_result(inside: str, part: str) -> None:
    cost = program_cost(TPU.replace("128)(2,1)} parameter(1)\n", f"128)(2,1)}} {inside}\n"))
    assert cost.parts == {part: 32_000, "elementwise": 7}
    named = 'backend_config={"estimated_cycles":"7"}'
    text = TPU.replace(named, f'metadata={{op_name="transpose(jvp(norm))/mul"}}, {named}')
    assert program_cost(text).parts["norm"] == 7


@pytest.mark.parametrize(
    ("fixed", "open_ended"),
    [
        ("constant(32)", "copy(%state)"),
        # Ends sooner if something else says so, as decoding does.
        (
            "ROOT %lt = pred[]{:T(512)} compare(",
            "ROOT %both = pred[] and(%lt, %i)\n  %lt = compare(",
        ),
    ],
)
@pytest.mark.parametrize("trips", [1, 16])
def test_a_loop_of_unknown_length_counts_as_often_as_is_said(
    fixed: str, open_ended: str, trips: int
) -> None:
    assert fixed in TPU
    text = TPU.replace(fixed, open_ended)
    cost = program_cost(text, trips)
    assert cost.collectives["all-gather"].executions == trips
    assert cost.open_loops == 1
    # What stands outside of the loop counts once.
    once = program_cost(text).cycles
    assert cost.cycles - once == (trips - 1) * (program_cost(text, 2).cycles - once)


def test_text_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="no entry computation"):
        program_cost("module @jit_step {\n}")


def test_collectives_of_a_scan_as_compiled_here() -> None:
    mesh = make_mesh(data=2, fsdp=4)

    def shard(x: jax.Array) -> jax.Array:
        def body(carry: jax.Array, _: None) -> tuple[jax.Array, None]:
            return jnp.tanh(jax.lax.psum(carry, "fsdp")), None

        x, _ = jax.lax.scan(body, x, length=5)
        return jax.lax.all_gather(x, "data", tiled=True)

    with jax.set_mesh(mesh):
        spec = PartitionSpec(("data", "fsdp"))
        split = jax.shard_map(shard, in_specs=spec, out_specs=spec, check_vma=False)
        text = jax.jit(split).lower(jnp.ones((8, 3))).compile().as_text()
    cost = program_cost(text)
    assert cost.collectives == {
        "all-gather": Traffic(1, 2 * 3 * 4),
        "all-reduce": Traffic(5, 5 * 2 * 1 * 3 * 4),
    }
    assert cost.cycles == cost.open_loops == 0


# Gathers of one [64, 512] shard to [512, 512], in the three forms that XLA has for TPUs: stepped
# through by the products of the meantime, by the sparse cores, and by none.
GATHERS = """HloModule jit_step, is_scheduled=true

%start.1 (p: bf16[64,512]) -> (bf16[64,512], bf16[512,512]) {
  %p = bf16[64,512]{1,0} parameter(0)
  ROOT %gather.1 = bf16[512,512]{1,0} all-gather(%p), channel_id=7, dimensions={0}
}

%overlap.1 (p: bf16[64,512]) -> bf16[512,512] {
  %p = bf16[64,512]{1,0} parameter(0)
  ROOT %gather.2 = bf16[512,512]{1,0} all-gather(%p), channel_id=7, dimensions={0}
}

%done.1 (p: bf16[64,512]) -> bf16[512,512] {
  %p = bf16[64,512]{1,0} parameter(0)
  ROOT %gather.3 = bf16[512,512]{1,0} all-gather(%p), channel_id=7, dimensions={0}
}

%offloaded.1 (p: bf16[64,512]) -> bf16[512,512] {
  %p = bf16[64,512]{1,0} parameter(0)
  ROOT %gather.4 = bf16[512,512]{1,0} all-gather(%p), channel_id=8, dimensions={0}
}, execution_thread="sparsecore"

ENTRY %main (x: bf16[64,512]) -> bf16[512,512] {
  %x = bf16[64,512]{1,0} parameter(0)
  %async-collective-start.1 = (bf16[64,512]{1,0}, bf16[512,512]{1,0}) fusion(%x), calls=%start.1
  %offload = ((bf16[64,512]{1,0}), bf16[512,512]{1,0}) call-start(%x), to_apply=%offloaded.1
  %product = bf16[512,512]{1,0} fusion(%x), calls=%overlap.1, \
backend_config={"estimated_cycles":"1000"}
  %async-collective-done.1 = bf16[512,512]{1,0} fusion(%product), calls=%done.1
  %other = bf16[512,512]{1,0} copy(%product), backend_config={"estimated_cycles":"30"}
  %offload.done = bf16[512,512]{1,0} call-done(%offload)
  %waits = bf16[512,512]{1,0} all-gather(%x), channel_id=9, dimensions={0}
  ROOT %moved = bf16[512,512]{1,0} custom-call(%waits), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/heads/shard_map/pallas_call"}
}
"""


def test_what_happens_while_a_collective_is_under_way() -> None:
    cost = program_cost(GATHERS)
    size = 512 * 512 * 2
    assert sorted(cost.waits) == [Wait(1, size, 0), Wait(1, size, 1000), Wait(1, size, 1030)]
    assert cost.collectives == {"all-gather": Traffic(3, 3 * size)}
    assert cost.moved == 2 * size
    v5e = CHIPS["tpu-v5e"]
    program = Program("step", 0, 0, 0, cost, kernel_flops=0.0, compile_seconds=0.0)
    travel, cycle = size / 200e9, 1 / 1.5e9
    assert travel > 1030 * cycle
    expected = 3 * travel - 2030 * cycle
    assert program.waiting_seconds(v5e) == pytest.approx(expected)
    computing = 1030 * cycle + 2 * size / v5e.bandwidth
    assert program.compute_seconds(v5e) == pytest.approx(computing)
    assert program.scheduled_seconds(v5e) == pytest.approx(computing + expected)


QUANTISED = """HloModule jit_read

%fused (p: s8[2,64,32]) -> bf16[8,32] {
  %p = s8[2,64,32]{2,1,0} parameter(0)
  %converted = bf16[64,32]{1,0} convert(%p)
  ROOT %product = bf16[8,32]{1,0} convolution(%converted), dim_labels=bf_io->bf
}

ENTRY %main (w: s8[2,64,32]) -> bf16[8,32] {
  %w = s8[2,64,32]{2,1,0} parameter(0)COPY
  ROOT %y = bf16[8,32]{1,0} fusion(%w), kind=kOutput, calls=%fused
}
"""
COPY = """
  %copy = bf16[2,1,32,64]{2,3,1,0} fusion(%w), kind=kLoop, calls=%transposed"""


def test_products_with_codes_and_what_only_a_fusion_holds_are_no_copies() -> None:
    assert not expanded_codes(QUANTISED.replace("COPY", ""))
    assert expanded_codes(QUANTISED.replace("COPY", COPY)) == {("bf16", (2, 32, 64))}
    inside = TPU.replace("bf16[256,128]{1,0} custom-call(%state)", "s8[256,128] copy(%state)")
    inside = inside.replace("fusion(%begin, %kernel)", "convert(%kernel)")
    assert ("bf16", (64, 512)) in expanded_codes(inside)  # of the loop's body too


def test_a_fusion_gives_out_a_product_and_a_copy() -> None:
    """As an output beside the product; of an inner fusion; through one that multiplies too."""
    alone = QUANTISED.replace("COPY", "")
    before = "  ROOT %product = bf16[8,32]{1,0} convolution(%converted), dim_labels=bf_io->bf\n"
    both = "(bf16[8,32]{1,0}, /*index=1*/bf16[64,32]{1,0})"
    product = before.replace("ROOT ", "")
    given = f"  ROOT %outputs = {both} tuple(%product, %converted)\n"
    copying = alone.replace(before, product + given)
    copying = copying.replace("%y = bf16[8,32]{1,0}", f"%y = {both}")
    assert expanded_codes(copying) == {("bf16", (64, 32))}
    with pytest.raises(CopiesWeights, match=r"bf16\[64, 32\]"):
        check_no_copies("read", copying, [(64, 32)])

    inner = "%inner (q: s8[2,64,32]) -> bf16[64,32] {\n  %q = s8[2,64,32]{2,1,0} parameter(0)\n"
    inner += "  ROOT %c = bf16[64,32]{1,0} convert(%q)\n}\n\n"
    nested = copying.replace("%fused (p", inner + "%fused (p")
    nested = nested.replace("convert(%p)", "fusion(%p), kind=kLoop, calls=%inner")
    assert expanded_codes(nested) == {("bf16", (64, 32))}
    # What else is made of products is no copy, whatever its shape.
    scaled = given.replace("tuple(%product, %converted)", "tuple(%product, %scaled)")
    scaled = "  %scaled = bf16[64,32]{1,0} multiply(%product, %product)\n" + scaled
    assert not expanded_codes(copying.replace(given, scaled))


def test_a_copy_of_a_quantised_kernel_is_found() -> None:
    check_no_copies("read", QUANTISED.replace("COPY", ""), [(64, 32)])
    check_no_copies("read", QUANTISED.replace("COPY", COPY), [(8, 64)])
    # Neither activations nor a weight of 16 bits are copies of a kernel of their shape.
    activations = QUANTISED.replace("COPY", "").replace("bf16[8,32]", "bf16[64,32]")
    check_no_copies("read", activations, [(64, 32)])
    plain = "\n  %plain = bf16[64,32]{1,0} parameter(1)"
    check_no_copies("read", QUANTISED.replace("COPY", plain), [(64, 32)])
    with pytest.raises(CopiesWeights, match=r"read holds bf16\[2, 32, 64\]: a copy of a quantised"):
        check_no_copies("read", QUANTISED.replace("COPY", COPY), [(64, 32)])


def test_what_leaves_a_slice_is_what_the_runtime_sends() -> None:
    """As XLA writes it for two slices of v5e, in the loop of 32."""
    send = (
        "  %send = (bf16[29,8,128]{2,1,0:T(8,128)(2,1)}, u32[], token[]) send(%weight, %begin), "
        "channel_id=2, is_host_transfer=true, "
        'frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}\n'
    )
    loop = "  ROOT %fusion.1 ="
    assert program_cost(TPU).between_slices == Traffic(0, 0)
    cost = program_cost(TPU.replace(loop, send + loop))
    assert cost.between_slices == Traffic(32, 32 * 29 * 8 * 128 * 2)
    to_the_host = send.replace("xla_megascale_runtime", "another")
    assert program_cost(TPU.replace(loop, to_the_host + loop)).between_slices == Traffic(0, 0)
