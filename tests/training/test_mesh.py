"""Training on meshes: the numbers of one device, declared shardings, expected collectives."""

import dataclasses
import functools
import math
import pathlib
import types

import jax
import ml_collections
import numpy as np
import pytest
from _pytest.mark import ParameterSet
from jax.sharding import PartitionSpec

from configs import prumerge_7b_lora, prumerge_13b_lora
from prumerge_jax.aot.hlo import program_cost
from prumerge_jax.models.config import LlavaConfig, published
from prumerge_jax.sharding.mesh import use_mesh
from prumerge_jax.training.checkpoint import Checkpoints
from prumerge_jax.training.config import MeshConfig, parse
from prumerge_jax.training.run import fitted_sizes
from prumerge_jax.training.step import TrainState
from prumerge_jax.training.weights import Weights
from tests.conftest import require_eight_devices
from tests.training.bench import MODEL as BENCH_MODEL
from tests.training.bench import Bench, lora_config

STEPS = 5
# Every axis of every weight divides by eight.
MODEL = LlavaConfig(
    vision=dataclasses.replace(BENCH_MODEL.vision, width=32, num_heads=8),
    text=dataclasses.replace(BENCH_MODEL.text, num_heads=8, num_kv_heads=8, head_dim=4),
)
MESHES = [(8, 1, 1), (2, 2, 2), (1, 4, 2), (1, 1, 8)]


def mesh_case(sizes: tuple[int, int, int], *more: object) -> ParameterSet:
    """A case of a test; all meshes but the one that splits every axis are slow."""
    marks = [] if sizes == (2, 2, 2) else [pytest.mark.slow]
    return pytest.param(sizes, *more, id="x".join(map(str, sizes)), marks=marks)


mesh_cases = pytest.mark.parametrize("sizes", [mesh_case(sizes) for sizes in MESHES])


@functools.cache
def bench_on(sizes: tuple[int, int, int]) -> Bench:
    require_eight_devices()
    return Bench(lora_config(), sizes=sizes, model=MODEL)


@functools.cache
def trained_on(sizes: tuple[int, int, int]) -> tuple[TrainState, list[float]]:
    return bench_on(sizes).train(8, STEPS)


def assert_same_weights(found: Weights, expected: Weights, tolerance: float) -> None:
    """Within `tolerance` of the largest value of every weight."""
    for path, weight in expected.items():
        scale = np.abs(weight).max()
        np.testing.assert_allclose(
            found[path], weight, rtol=0, atol=tolerance * scale, err_msg=path
        )


def assert_placed(state: TrainState, declared: TrainState) -> None:
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(declared), strict=True):
        assert leaf.sharding == sharding


@pytest.mark.parametrize("recipe", [prumerge_7b_lora, prumerge_13b_lora])
def test_no_device_stays_idle_and_no_shard_is_thin(recipe: types.ModuleType) -> None:
    config = parse(recipe.get_config())
    model = config.sizes
    for devices in (1, 3, 8, 48, 64, 256, 512):
        sizes = fitted_sizes(config.run.mesh, model, devices)
        assert math.prod(sizes.values()) == devices
        assert model.vision.width % (32 * sizes["fsdp"]) == 0
        assert model.text.width % (32 * sizes["fsdp"]) == 0
    assert fitted_sizes(config.run.mesh, model, 256) == {"data": 8, "fsdp": 32, "tensor": 1}
    mesh = MeshConfig(tensor=2)
    assert fitted_sizes(mesh, model, 16) == {"data": 1, "fsdp": 8, "tensor": 2}
    mesh = MeshConfig(tensor=2, fsdp=4)
    assert fitted_sizes(mesh, model, 16) == {"data": 2, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize("sizes", [(0, 1, 0), (0, 0, 0), (0, 3, 1), (0, 8, 2)])
def test_sizes_that_eight_devices_do_not_fit_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="cannot be fitted to 8 devices"):
        fitted_sizes(MeshConfig(*sizes), published("llava-1.5-7b"), 8)


@mesh_cases
def test_losses_and_weights_are_those_of_one_device(sizes: tuple[int, int, int]) -> None:
    expected, losses = trained_on((1, 1, 1))
    state, same = trained_on(sizes)
    np.testing.assert_allclose(same, losses, rtol=1e-5)
    assert_same_weights(state.trained, expected.trained, 1e-5)
    assert_placed(state, bench_on(sizes).shardings)
    path = "decoder.layers.self_attn.q_proj.lora_a"
    for array in (state.trained[path], state.optimizer[0].mu[path]):
        assert array.sharding.spec == PartitionSpec(None, ("fsdp", "tensor"), None)


@pytest.mark.parametrize("sizes", [(1, 1, 1), mesh_case((2, 2, 2))])
def test_shorter_rows_change_no_loss_and_no_weight(
    sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, losses = trained_on((1, 1, 1))
    monkeypatch.setattr("prumerge_jax.training.batches.SHORTEST_ROW", 16)
    bench = Bench(lora_config(max_length=96), sizes=sizes, model=MODEL)
    with use_mesh(bench.mesh):
        lengths = [b.ids.shape[1] for b in bench.batches(4) if (b.segment_ids > 0).any()]
    assert lengths[-1] < 96
    state, same = bench.train(4, STEPS)
    np.testing.assert_allclose(same, losses, rtol=1e-5)
    assert_same_weights(state.trained, expected.trained, 1e-5)


@pytest.mark.slow
def test_a_tied_head_and_biases_train_as_on_one_device() -> None:
    """The embedding is one weight, with the gradients of its rows and of the head together."""
    require_eight_devices()
    text = dataclasses.replace(MODEL.text, tied_head=True, qkv_bias=True)
    config = lora_config(
        learning_rates=(("decoder.*", 1e-3),), adapter=ml_collections.ConfigDict({"rank": 0})
    )
    states = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        bench = Bench(config, sizes=sizes, model=dataclasses.replace(MODEL, text=text))
        before = np.asarray(bench.trained["decoder.embed_tokens"])
        state, losses = bench.train(8, 2)
        assert np.abs(before - state.trained["decoder.embed_tokens"]).max() > 1e-4
        states.append((state.trained, losses))
    (expected, losses), (trained, same) = states
    np.testing.assert_allclose(same, losses, rtol=1e-5)
    assert "decoder.lm_head.kernel" not in expected
    assert "decoder.layers.self_attn.k_proj.bias" in expected
    assert_same_weights(trained, expected, 1e-4)


@mesh_cases
def test_images_keep_their_tokens(sizes: tuple[int, int, int]) -> None:
    plans = []
    for bench in (bench_on((1, 1, 1)), bench_on(sizes)):
        with use_mesh(bench.mesh):
            batches = bench.batches(8)
        plans.append(sum(int((batch.visual_index >= 0).sum()) for batch in batches))
    assert plans[0] == plans[1] > 0


@pytest.mark.parametrize(
    ("sizes", "micro_batch", "update"),
    [
        # Weights are replicated: sums of gradients and of the loss.
        mesh_case((8, 1, 1), {"all-reduce"}, set()),
        # Weights are gathered from their shards, and some activations change theirs. The update
        # sums the squares of the gradient's shards for its norm.
        mesh_case((2, 2, 2), {"all-gather", "all-reduce", "collective-permute"}, {"all-reduce"}),
        mesh_case((1, 4, 2), {"all-gather", "all-reduce", "collective-permute"}, {"all-reduce"}),
        # Partial sums of heads, of the MLP and of the vocabulary; adapters are gathered.
        mesh_case((1, 1, 8), {"all-gather", "all-reduce"}, {"all-reduce"}),
    ],
)
def test_collectives_of_the_step(
    sizes: tuple[int, int, int], micro_batch: set[str], update: set[str]
) -> None:
    bench = bench_on(sizes)
    with use_mesh(bench.mesh):
        batch, *_ = bench.batches(8)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            (bench.frozen, batch),
        )
        lowered = bench.step.lower(bench.objective.trained(), *shapes)
        found = {
            name: set(program_cost(program.compile().as_text()).collectives)
            for name, program in lowered.items()
        }
    assert found == {"accumulate": micro_batch, "update": update}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(directory, keep=1, metadata={})
    checkpoints.save(STEPS, trained_on((8, 1, 1))[0], {"samples": 40})
    checkpoints.close()
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [mesh_case(sizes) for sizes in ((1, 1, 1), (2, 2, 2), (4, 1, 2))])
def test_a_checkpoint_of_eight_devices_is_restored_on_others(
    saved: pathlib.Path, sizes: tuple[int, int, int]
) -> None:
    bench = bench_on(sizes)
    target = bench.step.abstract_state(bench.objective.trained())
    restored = Checkpoints(saved, keep=1, metadata={}).restore(target)
    assert restored is not None
    assert (restored.step, restored.position) == (STEPS, {"samples": 40})
    jax.tree.map(np.testing.assert_array_equal, restored.state, trained_on((8, 1, 1))[0])
    assert_placed(restored.state, bench.shardings)
