"""What a run chooses of its execution, and that its results do not depend on it."""

import dataclasses
import functools
import logging
import math
import types
from typing import Any

import jax
import ml_collections
import numpy as np
import pytest

from configs import prumerge_7b_lora, prumerge_13b_lora
from prumerge_jax.cost import CHIPS, counts
from prumerge_jax.cost.training import MicroBatch, kept_bytes, working_bytes
from prumerge_jax.models.remat import REMAT
from prumerge_jax.models.tuning import Frozen
from prumerge_jax.sharding.mesh import make_mesh, use_mesh
from prumerge_jax.training import fit
from prumerge_jax.training.batches import RowBatch
from prumerge_jax.training.config import TrainConfig, parse
from prumerge_jax.training.fit import (
    CAUTIOUS,
    Execution,
    choices,
    fitted,
    micro_batch,
)
from prumerge_jax.training.objectives.next_token import abstract_rows
from prumerge_jax.training.step import TrainState
from prumerge_jax.training.weights import Weights
from tests.conftest import require_eight_devices
from tests.training.bench import Bench, lora_config
from tests.training.test_mesh import MODEL

GIB = 2**30
SHARDED: dict[Frozen, int] = {"sharded": GIB}
POD = {"data": 2, "fsdp": 32, "tensor": 1}
V5E = CHIPS["tpu-v5e"]


def open_config(**changes: object) -> TrainConfig:
    config = prumerge_7b_lora.get_config()
    config.update(changes)
    return parse(config)


def test_less_memory_keeps_less_and_the_last_resort_is_always_there() -> None:
    config, found = open_config(), []
    for gib in (100, 15.75, 7.5, 3, 0.5):
        found.append(choices(config, SHARDED, POD, V5E, gib * GIB))
        for choice in found[-1][:-1]:
            planned = GIB + working_bytes(micro_batch(config, POD, choice), choice.remat)
            assert planned <= 0.9 * gib * GIB
        assert found[-1][-1] == CAUTIOUS
    assert [these[0].remat for these in found] == ["dots", "dots", "wide", "full", "full"]
    assert found[0] == [Execution(remat, 1) for remat in ("dots", "wide", "full")]
    one = micro_batch(config, POD, CAUTIOUS)
    kept = [kept_bytes(one, remat) for remat in ("full", "wide", "dots")]
    assert kept == sorted(kept)
    # Carries of 32 layers in bfloat16.
    assert kept[0] == 32 * 2048 * 4096 * 2


@pytest.mark.parametrize(
    ("recipe", "shards", "gib"),
    # Per chip by XLA's plans for v5e with `full` (benchmarks/tpu_plan.py, libtpu 0.0.42.1).
    [
        (prumerge_7b_lora, 8, 4.6),
        (prumerge_7b_lora, 32, 2.5),
        (prumerge_13b_lora, 8, 7.9),
        (prumerge_13b_lora, 32, 4.0),
    ],
)
def test_the_cost_model_plans_the_memory_that_xla_plans(
    recipe: types.ModuleType, shards: int, gib: float
) -> None:
    config = parse(recipe.get_config())
    batch = micro_batch(config, {"data": 1, "fsdp": shards, "tensor": 1}, CAUTIOUS)
    # Weights in bfloat16; adapters, their sums and moments in float32.
    weights = 2 * counts.parameters(config.sizes).total
    weights += 16 * counts.lora_parameters(config.sizes.text, 128)
    planned = weights / shards + working_bytes(batch, "full")
    assert planned / GIB == pytest.approx(gib, rel=fit.RESERVE)


def test_short_rows_share_the_gathers_of_the_weights() -> None:
    """A row of 2048 computes for longer than its weights travel; rows of 256 take several."""
    short = open_config(max_length=256)
    first, *_ = choices(short, SHARDED, POD, V5E, 100 * GIB)
    assert 1 < first.rows_per_shard <= 8
    alone = dict.fromkeys(POD, 1)
    assert choices(short, SHARDED, alone, V5E, 100 * GIB)[0] == Execution("dots", 1)
    assert choices(short, SHARDED, POD, None, 100 * GIB)[0] == Execution("dots", 1)
    whole = choices(short, {"replicated": GIB}, POD, V5E, 100 * GIB)[0]
    assert whole == Execution("dots", 1, "replicated")


def test_frozen_weights_are_whole_where_that_is_preferred_and_fits() -> None:
    """Keeping more of a layer comes first: recomputing costs more than gathering."""
    config, found = open_config(), []
    resident: dict[Frozen, int] = {"replicated": 14 * GIB, "sharded": GIB}
    for gib in (100, 26, 20, 0.5):
        found.append(choices(config, resident, POD, CHIPS["tpu-v6e"], gib * GIB)[0])
    assert found == [
        Execution("dots", 1, "replicated"),
        Execution("dots", 1, "replicated"),
        Execution("dots", 1, "sharded"),
        Execution("full", 1, "sharded"),
    ]


def test_what_is_given_is_kept() -> None:
    given = open_config(remat="none", run=ml_collections.ConfigDict({"rows_per_shard": 3}))
    assert choices(given, SHARDED, POD, V5E, GIB) == [Execution("none", 3)]


def tiny(**changes: object) -> TrainConfig:
    return dataclasses.replace(lora_config(remat="auto"), model=MODEL, **changes)  # type: ignore[arg-type]


def test_without_a_known_memory_it_is_cautious_and_a_resumed_run_keeps_its_choice(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "prumerge_jax")
    mesh, config = make_mesh(), tiny()
    found, record = fitted(config, mesh)
    assert (found.remat, found.run.rows_per_shard) == ("full", 1)
    assert caplog.messages == [
        "remat full, 1 rows per data shard, frozen weights sharded: the memory of a cpu is not "
        "known"
    ]
    monkeypatch.setattr(fit, "_memory", lambda device: float(GIB))
    found, other = fitted(config, mesh)
    assert (found.remat, other["remat"]) == ("dots", "dots")
    assert "of 1.0 GiB per device planned, 10 % are kept free" in caplog.messages[-1]
    # Kept on the same mesh, chosen anew on another, and no say over what is given.
    assert fitted(config, mesh, record)[0].remat == "full"
    assert fitted(config, mesh, {**record, "mesh": POD})[0].remat == "dots"
    count = len(caplog.messages)
    explicit = dataclasses.replace(config, remat="none", run=found.run)
    assert fitted(explicit, mesh, record)[0] == explicit
    assert len(caplog.messages) == count


@functools.cache
def trained(
    remat: str,
    sizes: tuple[int, int, int],
    rows: int,
    dropout: float,
    frozen: Frozen = "sharded",
) -> tuple[TrainState, list[float]]:
    adapter = ml_collections.ConfigDict({"rank": 4, "alpha": 8.0, "dropout": dropout})
    run = ml_collections.ConfigDict({"frozen": frozen})
    bench = Bench(lora_config(remat=remat, adapter=adapter, run=run), sizes=sizes, model=MODEL)
    kernel = bench.frozen["decoder.layers.mlp.up_proj.kernel"]
    shards = sizes[2] * (sizes[1] if frozen == "sharded" else 1)
    assert math.prod(kernel.sharding.shard_shape(kernel.shape)) == kernel.size // shards
    return bench.train(rows, 5)


def assert_same(
    ours: tuple[TrainState, list[float]], theirs: tuple[TrainState, list[float]]
) -> None:
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5)
    for path, weight in theirs[0].trained.items():
        scale = float(np.abs(weight).max())
        np.testing.assert_allclose(
            ours[0].trained[path], weight, rtol=0, atol=1e-5 * scale, err_msg=path
        )


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
@pytest.mark.parametrize("remat", [name for name in REMAT if name != "none"])
def test_every_policy_trains_the_same(remat: str, sizes: tuple[int, int, int]) -> None:
    """With dropout: masks are drawn anew, and must be the same ones."""
    require_eight_devices()
    assert_same(trained(remat, sizes, 4, 0.1), trained("none", sizes, 4, 0.1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "rows"), [((1, 1, 1), 1), ((1, 1, 1), 3), ((2, 2, 2), 4), ((2, 2, 2), 8)]
)
def test_every_number_of_rows_trains_the_same(sizes: tuple[int, int, int], rows: int) -> None:
    require_eight_devices()
    assert_same(trained("dots", sizes, rows, 0.0), trained("dots", (1, 1, 1), 8, 0.0))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_frozen_weights_train_the_same_whole(sizes: tuple[int, int, int]) -> None:
    """With dropout; the trained weights and their moments stay in their shards."""
    require_eight_devices()
    ours = trained("dots", sizes, 8, 0.1, "replicated")
    assert_same(ours, trained("dots", sizes, 8, 0.1))
    weight = ours[0].trained["decoder.layers.mlp.up_proj.lora_b"]
    shards = sizes[1] * sizes[2]
    assert math.prod(weight.sharding.shard_shape(weight.shape)) == weight.size // shards


@pytest.mark.parametrize("remat", ["full", "wide", "dots"])
def test_policies_keep_what_the_cost_model_counts(remat: str) -> None:
    text = dataclasses.replace(MODEL.text, num_layers=3)
    bench = Bench(lora_config(remat=remat), model=dataclasses.replace(MODEL, text=text))
    with use_mesh(bench.mesh):
        rows = abstract_rows(
            fit.fixed(bench.config, Execution(remat, 4)), 1, bench.config.row_length
        )

        def backward(trained: Weights, frozen: Weights, batch: RowBatch) -> Any:
            def loss(trained: Weights) -> jax.Array:
                return bench.objective.loss({**frozen, **trained}, batch, jax.random.key(0))[0]

            return jax.vjp(loss, trained)[1]

        kept = jax.eval_shape(backward, bench.trained, bench.frozen, rows)
    stacked = [leaf for leaf in jax.tree.leaves(kept) if leaf.shape[:3] == (3, 4, 48)]
    numbers = sum(math.prod(leaf.shape) for leaf in stacked)
    counted = kept_bytes(MicroBatch(text, rank=4, rows=4, length=48, logit_positions=48), remat) / 2
    if remat == "dots":  # this attention has no kernel that names its output
        counted -= 3 * 4 * 48 * text.num_heads * (text.head_dim + 2)
    assert numbers == counted
