"""Towers that compute their later layers on fewer tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prumerge_jax import cost, reductions
from prumerge_jax.cost import counts
from prumerge_jax.models.config import VisionConfig, published
from prumerge_jax.models.layers import stack
from prumerge_jax.models.llava import gather_evidence
from prumerge_jax.models.tower_stages import run_stages
from prumerge_jax.models.vision_tower import VisionLayer
from prumerge_jax.reductions import Stage
from tests.tiny_llava import CONFIG, random_llava

LAYERS = 7


def golden_layers(weights) -> VisionLayer:
    """The golden tower up to its features, the output of the last layer but one, stacked."""
    config = VisionConfig(
        image_size=96, patch_size=8, width=64, mlp_width=96, num_layers=LAYERS + 1, num_heads=4,
        activation="gelu", layer_norm_eps=1e-5,
    )  # fmt: skip
    with nnx.use_eager_sharding(False):
        layers = stack(lambda rngs: VisionLayer(config, rngs=rngs), LAYERS, nnx.Rngs(0))
    graphdef, state = nnx.split(layers)
    flat = {}
    for path, variable in nnx.to_flat_state(state):
        *module, leaf = map(str, path)
        name = ".".join(module).replace("fc1", "0").replace("fc2", "2")
        kind = {"scale": "weight", "kernel": "weight", "bias": "bias"}[leaf]
        arrays = [weights[f"weights.{i}.{name}.{kind}"].astype(np.float32) for i in range(LAYERS)]
        stacked = np.stack([array.T if leaf == "kernel" else array for array in arrays])
        flat[path] = variable.replace(jnp.asarray(stacked))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


@pytest.mark.golden
@pytest.mark.parametrize("kind", ["plain", "proportional"])
@pytest.mark.slow
def test_prumerge_at_three_layers_is_the_loops(golden, kind: str) -> None:
    if not (golden / "reducers").is_dir():
        pytest.skip("the golden data has no reducers/")
    tower, inputs, expected = (
        np.load(golden / "reducers" / f"{name}.npz")
        for name in ("flowcut", "inputs", "independent")
    )
    stages = tuple(
        Stage(layer, tokens, "attention", kind == "proportional")
        for layer, tokens in ((1, 96), (3, 48), (5, 27))
    )
    hidden, groups = jax.jit(lambda layers, x: run_stages(layers, x, stages, num_heads=4))(
        golden_layers(tower), inputs["hidden_144"]
    )
    for image in range(len(hidden)):
        wanted = {
            name: expected[f"intower_144_{image}_{kind}_{name}"]
            for name in ("features", "sizes", "patches", "source_of_patch")
        }
        np.testing.assert_array_equal(groups.patches[image, 1:], wanted["patches"])
        np.testing.assert_array_equal(groups.sizes[image], wanted["sizes"])
        np.testing.assert_array_equal(groups.token_of[image], wanted["source_of_patch"])
        np.testing.assert_allclose(hidden[image], wanted["features"], atol=1e-4)


@pytest.mark.parametrize(
    "spelling",
    [
        "intower:tokens=4",
        "tome:tokens=4",
        pytest.param("tome:tokens=3,merges=1", marks=pytest.mark.slow),
    ],
)
def test_tokens_patches_and_explanations(spelling: str) -> None:
    vision, side = random_llava(CONFIG).vision, CONFIG.vision.image_size
    patches = CONFIG.vision.num_patches
    pixels = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), np.uint8)
    reduction = reductions.parse(spelling)

    @jax.jit
    def run(pixels):
        evidence = gather_evidence(vision, pixels, reduction, dtype=jnp.float32)
        return reductions.reduce(evidence, reduction), reductions.explain(evidence, reduction)

    visual, explained = run(pixels)
    assert (np.asarray(visual.lengths) == reduction.tokens).all()
    assert visual.tokens.shape == (3, reduction.tokens, CONFIG.vision.width)
    for kept, targets in zip(visual.patch_indices, explained.targets, strict=True):
        np.testing.assert_array_equal(targets[kept], np.arange(reduction.tokens))
        assert targets.shape == (patches,)
        assert ((targets >= -1) & (targets < reduction.tokens)).all()
        if spelling.startswith("intower"):
            assert (targets >= 0).all()
    again = run(pixels[[2, 0, 1]])[0]
    np.testing.assert_array_equal(again.tokens, visual.tokens[np.array([2, 0, 1])])


@pytest.mark.slow
def test_as_many_tokens_as_patches_change_nothing() -> None:
    vision, side = random_llava(CONFIG).vision, CONFIG.vision.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    gather = jax.jit(gather_evidence, static_argnames=("reduction", "dtype"))
    plain = gather(vision, pixels, reduction=reductions.parse("full"), dtype=jnp.float32)
    for name in ("intower", "tome"):
        evidence = gather(vision, pixels, reduction=reductions.parse(name), dtype=jnp.float32)
        np.testing.assert_allclose(evidence.hidden, plain.hidden, atol=1e-5)
        np.testing.assert_allclose(evidence.attention, plain.attention, atol=1e-6)


def test_the_tower_costs_less() -> None:
    vision = published("llava-1.5-7b").vision
    full = counts.tower_flops(vision)
    assert counts.staged_tower_flops(vision, ()) == full
    late = counts.staged_tower_flops(vision, (Stage(22, 64, "attention"),))
    assert 0.99 * full < late < full
    whole = counts.staged_tower_flops(vision, (Stage(0, 64, "bipartite"),))
    assert whole < 0.2 * full
    for name in ("intower", "tome"):
        stages = counts.stages_of(vision, reductions.parse(name))
        assert 0.4 < counts.staged_tower_flops(vision, stages) / full < 0.7
        workload = cost.Workload(64, 60, tower_stages=stages)
        (tower,) = cost.operations(published("llava-1.5-7b"), workload)["vision"]
        assert tower.flops == counts.staged_tower_flops(vision, stages)
    assert counts.stages_of(vision, reductions.parse("cover")) == ()
