"""The step: packing, accumulation, what changes and what does not."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from prumerge_jax.data import packing
from prumerge_jax.data.tokens import IGNORE
from prumerge_jax.data.visual_layout import CropTokens, runs
from prumerge_jax.sharding.mesh import use_mesh
from prumerge_jax.sharding.processes import to_global_array
from prumerge_jax.training.batches import RowBatch
from prumerge_jax.training.objectives.next_token import ImageEncoder
from prumerge_jax.training.step import Sums
from tests.training.bench import EXAMPLES, MODEL, Bench, lora_config
from tests.training.conftest import make_examples


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(lora_config())


def sums_of(bench: Bench, batch: RowBatch) -> Sums:
    with use_mesh(bench.mesh):
        zeros, when = bench.step.zeros(bench.trained), np.zeros(2, np.int32)
        return bench.step.accumulate(zeros, bench.trained, bench.frozen, batch, when)


def one_per_row(requests: list[packing.Request], num_slots: int, row_length: int) -> packing.Rows:
    """Request i alone in row i."""
    alone = [packing.pack_window([r], num_slots, row_length, 1)[0] for r in requests]
    fields = [field.name for field in dataclasses.fields(packing.Rows)]
    fields = [name for name in fields if name not in ("branch_ids", "taps")]  # None of all
    joined = {name: np.concatenate([getattr(rows, name) for rows in alone]) for name in fields}
    return packing.Rows(**joined, branch_ids=None, taps=None)


def test_packed_rows_have_the_loss_of_one_sample_per_row(bench: Bench) -> None:
    with use_mesh(bench.mesh):
        encode = ImageEncoder(bench.config, bench.frozen, bench.mesh)
        visual = encode(to_global_array(np.stack([e.pixels for e in EXAMPLES]), bench.mesh))
        crops = CropTokens(
            np.asarray(visual.lengths), np.asarray(visual.patch_indices), MODEL.vision.num_patches
        )
        requests = [
            packing.Request(e.token_ids, (run,) * e.has_image, e.labels)
            for run, e in zip(runs(crops, range(len(EXAMPLES))), EXAMPLES, strict=True)
        ]
    (packed,) = packing.pack_window(requests, crops.num_slots, 48, 8)
    alone = one_per_row(requests, crops.num_slots, 48)
    assert packed.segment_ids.max() > alone.segment_ids.max() == 1
    sums = []
    for rows in (packed, alone):
        fields = (rows.ids, rows.visual_index, rows.positions, rows.segment_ids, rows.targets)
        placed = (to_global_array(field, bench.mesh) for field in fields)
        sums.append(sums_of(bench, RowBatch(*placed, visual.tokens)))
    assert float(sums[0].targets) == float(sums[1].targets) > 0
    assert float(sums[0].loss) == pytest.approx(float(sums[1].loss), rel=2e-6)
    for path, gradient in sums[0].gradient.items():
        np.testing.assert_allclose(
            gradient, sums[1].gradient[path], atol=1e-4, rtol=1e-4, err_msg=path
        )


@pytest.mark.slow
def test_accumulation_equals_the_big_batch(bench: Bench) -> None:
    """Even though the micro-batches hold different numbers of target tokens."""
    whole, parts = bench.batches(8), bench.batches(1)
    assert len(whole) == 1
    assert len(parts) > 2
    assert len({int((batch.targets != IGNORE).sum()) for batch in parts}) > 1
    state, losses = bench.train(8, 3)
    accumulated, same = bench.train(1, 3)
    np.testing.assert_allclose(same, losses, rtol=2e-6)
    for path, weight in state.trained.items():
        np.testing.assert_allclose(accumulated.trained[path], weight, atol=2e-5, err_msg=path)


def test_only_adapters_and_projector_change(bench: Bench) -> None:
    before = {path: np.array(weight) for path, weight in bench.frozen.items()}
    start = {path: np.array(weight) for path, weight in bench.trained.items()}
    state, losses = bench.train(8, 4)
    assert losses[-1] < losses[0]
    for path, weight in before.items():
        assert np.asarray(bench.frozen[path]).tobytes() == weight.tobytes(), path
    assert {path.rsplit(".", 1)[-1] for path in start} == {"lora_a", "lora_b", "kernel", "bias"}
    assert all(p.startswith("projector.") for p in start if "lora_" not in p)
    for path, weight in start.items():
        assert np.abs(state.trained[path] - weight).max() > 1e-5, path
    adam = state.optimizer[0]
    assert set(adam.mu) == set(adam.nu) == set(start)


def test_a_batch_without_targets_changes_nothing(bench: Bench) -> None:
    with use_mesh(bench.mesh):
        (batch,) = bench.batches(8)
        empty = batch._replace(targets=jnp.full_like(batch.targets, IGNORE))
        state, metrics = bench.step(bench.step.init(bench.trained), bench.frozen, [empty], 0)
    assert (float(metrics.loss), float(metrics.gradient_norm), float(metrics.targets)) == (0, 0, 0)
    for path, weight in bench.trained.items():
        np.testing.assert_array_equal(state.trained[path], weight, err_msg=path)


def test_nan_in_padding_reaches_neither_loss_nor_gradient(bench: Bench) -> None:
    (batch,) = bench.batches(8)
    used = np.zeros(batch.visual_tokens.shape[:2], bool).reshape(-1)
    used[np.unique(batch.visual_index)[1:]] = True
    poison = jnp.where(used.reshape(batch.visual_tokens.shape[:2])[..., None], 0, jnp.nan)
    poisoned = batch._replace(visual_tokens=batch.visual_tokens + poison)
    assert np.isnan(poisoned.visual_tokens).any()

    clean, dirty = sums_of(bench, batch), sums_of(bench, poisoned)
    assert float(clean.loss) == float(dirty.loss)
    for path, gradient in clean.gradient.items():
        np.testing.assert_array_equal(dirty.gradient[path], gradient, err_msg=path)


@pytest.mark.slow
def test_dropout_depends_on_seed_and_step_alone() -> None:
    adapter = ml_collections.ConfigDict({"rank": 4, "alpha": 8.0, "dropout": 0.5})
    bench = Bench(lora_config(adapter=adapter))
    with use_mesh(bench.mesh):
        batches = bench.batches(8)

        def loss(step: int) -> float:
            _, metrics = bench.step(bench.step.init(bench.trained), bench.frozen, batches, step)
            return float(metrics.loss)

        assert loss(3) == loss(3)
        assert loss(3) != loss(4)


def test_text_alone_takes_the_same_step_and_the_tower_would_change_nothing(bench: Bench) -> None:
    texts = make_examples(8, image_size=48, vocabulary=64, seed=3, text_only=tuple(range(8)))
    with use_mesh(bench.mesh):
        encode = ImageEncoder(bench.config, bench.frozen, bench.mesh)
        (with_images,), (without,) = bench.batches(8), bench.batches(8, texts)
        pixels = to_global_array(np.stack([e.pixels for e in texts]), bench.mesh)
        encoded = without._replace(visual_tokens=encode(pixels).tokens)
    sums_of(bench, with_images)
    compiled = bench.step.accumulate._cache_size()
    skipped, ran = sums_of(bench, without), sums_of(bench, encoded)
    assert bench.step.accumulate._cache_size() == compiled
    assert float(skipped.targets) > 0
    for ours, theirs in zip(jax.tree.leaves(skipped), jax.tree.leaves(ran), strict=True):
        np.testing.assert_array_equal(ours, theirs)
