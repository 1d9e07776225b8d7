"""Plans of training: their arithmetic, their errors, and a real one for a small slice."""

import dataclasses
import importlib.util
import math
import subprocess

import ml_collections
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import common
from prumerge_jax.aot.compile import DoesNotFit, Program
from prumerge_jax.aot.hlo import ProgramCost, Traffic, Wait
from prumerge_jax.aot.topology import Topology, topology
from prumerge_jax.aot.training import PACKING_OVERHEAD, Samples, TrainingPlan, plan_training
from prumerge_jax.cost import CHIPS, counts
from prumerge_jax.models.config import LlavaConfig, TextConfig, published
from prumerge_jax.training.fit import Execution
from tests.programs import run_program

GIB = 2**30
V5E = CHIPS["tpu-v5e"]
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: pip install 'prumerge_jax[tpu]'",
)


def program(name: str, cycles: int, received: int, temporaries: int = 0) -> Program:
    waits = (Wait(1, received, cycles), Wait(2, 0, 0))
    cost = ProgramCost({"all-gather": Traffic(3, received)}, cycles, open_loops=0, waits=waits)
    return Program(name, GIB, GIB // 4, temporaries, cost, kernel_flops=0.0, compile_seconds=1.0)


def plan(samples: Samples) -> TrainingPlan:
    return TrainingPlan(
        topology=Topology("v5e:2x4", V5E, (None,) * 8),  # type: ignore[arg-type]
        model=published("llava-1.5-7b"),
        mesh={"data": 1, "fsdp": 8, "tensor": 1},
        samples=samples,
        execution=Execution("wide", 1),
        row_length=2048,
        lora_rank=128,
        encode=program("encode", cycles=15_000_000, received=0),
        crops_per_part=128,
        accumulate={
            length: program(
                f"accumulate {length}",
                1_500_000_000 * length // 2048,
                300 * 10**9,
                temporaries=3 * GIB * length // 2048,
            )
            for length in (512, 1024, 1536, 2048)
        },
        update=program("update", cycles=3_000_000, received=0),
        resident=5 * GIB,
    )


@given(count=st.integers(8, 512), visual=st.integers(1, 576), text=st.integers(1, 2000))
def test_rows_hold_all_samples_and_time_follows_the_micro_batches(
    count: int, visual: int, text: int
) -> None:
    found = plan(Samples(count, visual, text))
    assert set(found.row_lengths[:-1]) <= {2048}
    positions = found.rows * sum(found.row_lengths)
    tokens = PACKING_OVERHEAD * count * (visual + text)
    assert positions - 512 * found.rows < tokens <= positions + found.rows
    # 15 and 3 million cycles at 1.5 GHz; 1 s of computing at most, and 1.5 s on the links.
    encoding = 0.010 * math.ceil(count / 128)
    assert math.isclose(found.seconds, encoding + len(found.row_lengths) * 1.5 + 0.002)
    flops = counts.training_flops(found.model, visual, text, 128)
    peak = 8 * V5E.flops * found.seconds
    assert math.isclose(found.utilisation, count * sum(flops.values()) / peak)


def test_what_is_left_takes_shorter_rows() -> None:
    assert plan(Samples(128, 144, 200)).row_lengths == [2048, 2048, 1536]
    assert plan(Samples(128, 576, 200)).row_lengths == [2048] * 6 + [512]
    assert plan(Samples(8, 144, 200)).row_lengths == [512]


def test_memory_is_what_stays_and_the_largest_working_set() -> None:
    assert plan(Samples(128, 144, 200)).memory == 5 * GIB + 3 * GIB + GIB // 4


def test_the_printed_plan_says_what_it_assumes_and_that_nothing_ran() -> None:
    found = dataclasses.replace(plan(Samples(128, 144, 200)), rejected=("data=1: too large",))
    assert round(100 * found.filled) == 98
    assert found.memory == 8.25 * GIB
    text = "\n".join(found.lines())
    figures = (
        "144",
        "200",
        "8 rows of 2048 + 2048 + 1536",
        "98 %",
        "8.25",
        "15.75",
        "300.00 GB",
        "remat wide, 1 rows",
    )
    for part in ("data=1 fsdp=8 tensor=1", "data=1: too large", "not run", *figures):
        assert part in text, part


def tiny_config(**changes: object) -> ml_collections.ConfigDict:
    """One layer of two heads as wide as the TPU's attention kernel wants."""
    config = common.training()
    text = TextConfig(
        vocab_size=256, width=256, mlp_width=256, num_layers=1, num_heads=2, num_kv_heads=2
    )
    config.model = common.sizes(LlavaConfig(vision=published("tiny").vision, text=text))
    config.learning_rates = (("decoder.*.lora_?", 1e-4),)
    config.adapter = ml_collections.ConfigDict({"rank": 8, "alpha": 16.0, "dropout": 0.0})
    config.reduction = "prumerge"
    config.max_length = 128
    config.batch_size = 8
    config.update(changes)
    return config


def _unsplittable() -> ml_collections.ConfigDict:
    """Neither the samples nor the heads divide by the four chips of a slice."""
    config = tiny_config(batch_size=7)
    config.model.text.num_heads = config.model.text.num_kv_heads = 3
    return config


@pytest.mark.tpu
@needs_libtpu
def test_a_step_compiled_for_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    slice_of_4 = topology("v5e:2x2")
    found = plan_training(tiny_config(batch_size=6), slice_of_4)
    assert found.mesh == {"data": 1, "fsdp": 2, "tensor": 2}
    assert "batch_size 6 is not a multiple of its 4 data shards" in found.rejected[0]
    assert found.encode.cost.cycles > 0
    assert found.samples.visual_tokens == pytest.approx(40 * 16 / 576)  # of 16 patches
    assert (found.execution.remat, found.execution.rows_per_shard) == ("dots", 2)  # rows are short
    (accumulate,) = found.accumulate.values()
    assert accumulate.cost.parts["adapter"] > 0
    assert (found.rows, found.row_lengths) == (2 * 2, [128] * len(found.row_lengths))
    assert accumulate.kernel_flops > 0  # the attention kernel that a TPU would run
    assert accumulate.cost.cycles > found.update.cost.cycles > 0
    assert accumulate.cost.open_loops == 0
    assert 0 < found.resident < found.memory < GIB
    # Frozen weights in bfloat16 over up to four chips; float32 adapters, sums and two moments.
    model = found.model
    decoder = counts.parameters(model).total * 2
    adapters = 16 * counts.lora_parameters(model.text, 8)
    assert decoder / 4 < found.resident < decoder + adapters

    with pytest.raises(DoesNotFit, match="batch_size 7 is not a multiple of its 4 data shards"):
        plan_training(_unsplittable(), slice_of_4)


@pytest.mark.tpu
@needs_libtpu
def test_weights_travel_while_others_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    idle = []
    for options in (True, False):
        config = tiny_config()
        config.run.xla_options, config.run.frozen = options, "sharded"
        config.run.mesh.data = 1
        found = plan_training(config, topology("v6e:2x2"))
        assert found.mesh == {"data": 1, "fsdp": 4, "tensor": 1}
        (accumulate,) = found.accumulate.values()
        moved = sum(traffic.bytes for traffic in accumulate.cost.collectives.values())
        waits = accumulate.cost.waits
        assert sum(wait.executions * wait.bytes for wait in waits) == moved
        idle.append(sum(wait.executions * wait.bytes for wait in waits if not wait.cycles) / moved)
    assert idle[1] == 1
    assert idle[0] < 0.5


@pytest.mark.tpu
@needs_libtpu
def test_frozen_weights_that_fit_are_not_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    received, resident = [], []
    for frozen in ("auto", "sharded"):
        config = tiny_config()
        config.run.frozen, config.run.mesh.data = frozen, 1
        found = plan_training(config, topology("v6e:2x2"))
        assert found.mesh == {"data": 1, "fsdp": 4, "tensor": 1}
        assert f"frozen weights {found.execution.frozen}" in "\n".join(found.lines())
        (accumulate,) = found.accumulate.values()
        received.append(sum(t.bytes for t in accumulate.cost.collectives.values()))
        resident.append(found.resident)
        assert bool(found.encode.cost.collectives) == (found.execution.frozen == "sharded")
    layers = 2 * counts.block_parameters(found.model.text)  # in bfloat16, forward and backward
    assert received[1] >= 2 * layers * 3 / 4
    assert received[0] < 2 * layers * 3 / 4 / 4  # adapters and sums of their gradients
    assert resident[0] - resident[1] >= layers * 3 / 4


@pytest.mark.tpu
@needs_libtpu
def test_images_of_several_crops_are_encoded_crop_by_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    config = tiny_config(crops_per_sample=3)
    side = config.model.vision.image_size
    config.model.image_grid_pinpoints = ((side, 2 * side), (2 * side, 2 * side))
    found = plan_training(config, topology("v5e:1x1"))
    # Plans assume five crops of an image; this run has room for three.
    assert found.samples.crops == 3
    assert found.samples.visual_tokens == pytest.approx(3 * 40 * 16 / 576)
    assert "in 3 crops" in found.samples.source
    one = plan_training(tiny_config(), topology("v5e:1x1"))
    pixels = 8 * 3 * side**2
    assert found.encode.arguments - one.encode.arguments >= 2 * pixels
    towers = [plan.model_flops["vision"] for plan in (found, one)]
    assert towers[0] == 3 * towers[1]


def test_other_stages_are_refused() -> None:
    none = Topology("v5e:1x1", V5E, (None,))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="plans are for 'next_token'"):
        plan_training(tiny_config(objective="contrastive"), none)


def train(*flags: str) -> subprocess.CompletedProcess[str]:
    return run_program("train.py", "--config=configs/prumerge_7b_lora.py", *flags)


@pytest.mark.tpu
@needs_libtpu
def test_an_unknown_slice_ends_the_command_with_a_reason() -> None:
    out = train("--aot=v9:2x2")
    assert out.returncode == 1
    assert "train.py: unknown topology 'v9:2x2'" in out.stderr


def test_either_a_workdir_or_a_slice_is_asked_for() -> None:
    out = train()
    assert out.returncode != 0
    assert "workdir" in out.stderr
    assert "aot" in out.stderr
