"""The method against the reference's outputs, a loop-form oracle, and its promises."""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from prumerge_jax import prumerge, sharding
from tests.conftest import require_eight_devices
from tests.prumerge_oracle import random_batch, reduce_one

PRESETS = ["prumerge", "prumerge+", "prumerge-fixed", "prumerge+fixed", "paper", "paper+",
           "select-only", "full"]  # fmt: skip
IMAGES = 8  # of every drawn setting
GOLDEN_NAMES = {
    "prumerge": "prumerge",
    "prumerge+": "prumerge_plus",
    "prumerge-fixed": "fixed",
    "prumerge+fixed": "fixed_plus",
}

reduce_tokens = jax.jit(prumerge.reduce_tokens, static_argnames="config")


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_cases(golden: pathlib.Path, name: str) -> None:
    cases = np.load(golden / "prumerge" / "cases.npz")
    for case in range(8):
        hidden, keys = cases[f"{case}/hidden"][None], cases[f"{case}/keys"][None]
        attention = prumerge.cls_attention(cases[f"{case}/query_cls"][None], keys)
        got = reduce_tokens(hidden[:, 1:], keys[:, 1:], attention, config=prumerge.preset(name))
        expected = cases[f"{case}/{GOLDEN_NAMES[name]}"]
        assert int(got.lengths[0]) == int(got.required[0]) == len(expected)
        np.testing.assert_allclose(got.tokens[0, : len(expected)], expected, atol=1e-5)
        assert not np.asarray(got.tokens[0, len(expected) :]).any()
        selected = cases[f"{case}/selected"]
        if name in ("prumerge", "prumerge+"):
            np.testing.assert_array_equal(got.patch_indices[0, : len(selected)], selected)


@pytest.mark.slow
def test_golden_tower(golden: pathlib.Path) -> None:
    """Photo to visual tokens through a tower of the real geometry, float32."""
    from flax import nnx
    from safetensors.numpy import load_file

    from prumerge_jax.data.images import load_image, preprocess
    from prumerge_jax.models.config import VisionConfig
    from prumerge_jax.models.llava import encode_images, normalize_pixels
    from prumerge_jax.models.vision_tower import VisionTower

    folder = golden / "prumerge" / "tower"
    hf = json.loads((folder / "config.json").read_text())
    config = VisionConfig(
        image_size=hf["image_size"],
        patch_size=hf["patch_size"],
        width=hf["hidden_size"],
        mlp_width=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"],
        activation=hf["hidden_act"],
    )
    with nnx.use_eager_sharding(False):
        tower = VisionTower(config, rngs=nnx.Rngs(0))
    _load_tower(tower, load_file(folder / "model.safetensors"), config)
    outputs = np.load(folder / "outputs.npz")
    run = jax.jit(encode_images, static_argnames="reduction")
    counts = {"extreme_ironing": (23, 93), "waterview": (99, 576)}
    for image, numbers in counts.items():
        pixels = preprocess(load_image(golden / "images" / f"{image}.jpg"), mode="crop")
        for name, kept in zip(("prumerge", "prumerge_plus"), numbers, strict=True):
            reduction = prumerge.preset({"prumerge_plus": "prumerge+"}.get(name, name))
            got = run(tower, jnp.asarray(pixels)[None], reduction=reduction)
            expected = outputs[f"{image}/{name}"]
            assert int(got.lengths[0]) == len(expected)
            assert kept in (len(expected), len(expected) - 1)
            wrong = np.abs(got.tokens[0, : len(expected)] - expected).max(-1) > 1e-4
            for slot in np.flatnonzero(wrong):
                features = tower(normalize_pixels(jnp.asarray(pixels)[None], config))
                change = expected[slot] - np.asarray(got.tokens[0, slot])
                _assert_tied_neighbours(features, int(got.patch_indices[0, slot]), change)
            assert wrong.sum() <= 1, "a tie within float32 rounding is rare"


def _assert_tied_neighbours(features, patch: int, change: np.ndarray) -> None:
    """The change is the swap of two neighbours whose similarities differ by float32 rounding."""
    attention = np.asarray(prumerge.cls_attention(features.queries[:, 0], features.keys))[0]
    values = attention[:, None] * np.asarray(features.hidden)[0, 1:]
    keys = np.asarray(features.keys, np.float64)[0, 1:]
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    similarity = unit @ unit[patch]
    similarity[patch] = -1
    order = np.argsort(-similarity)
    last, next_one = order[31], order[32]
    assert similarity[last] - similarity[next_one] < 3e-7
    swap = values[last] - values[next_one]
    assert min(np.abs(change - swap).max(), np.abs(change + swap).max()) < 1e-4


def _load_tower(tower, tensors: dict[str, np.ndarray], config) -> None:
    def tensor(name: str) -> np.ndarray:
        (key,) = [k for k in tensors if k.endswith(name)]
        return tensors[key]

    tower.class_embedding[...] = tensor("class_embedding")
    tower.patch_embedding.kernel[...] = tensor("patch_embedding.weight").transpose(2, 3, 1, 0)
    tower.position_embedding[...] = tensor("position_embedding.weight")
    tower.pre_layernorm.scale[...] = tensor("pre_layrnorm.weight")
    tower.pre_layernorm.bias[...] = tensor("pre_layrnorm.bias")
    blocks = [(tower.last.layer_norm1, "layer_norm1", [config.num_layers - 1], None)]
    blocks += [
        (getattr(tower.last, p), f"self_attn.{p}", [config.num_layers - 1], None)
        for p in ("q_proj", "k_proj")
    ]
    depth = list(range(config.num_layers - 1))
    for name in ("layer_norm1", "layer_norm2"):
        blocks.append((getattr(tower.layers, name), name, depth, "stack"))
    for group, names in (("self_attn", ("q_proj", "k_proj", "v_proj", "out_proj")),
                         ("mlp", ("fc1", "fc2"))):  # fmt: skip
        for name in names:
            module = getattr(getattr(tower.layers, group), name)
            blocks.append((module, f"{group}.{name}", depth, "stack"))
    for module, name, layers, stacked in blocks:
        for leaf in ("weight", "bias"):
            array = np.stack([tensor(f"encoder.layers.{i}.{name}.{leaf}") for i in layers])
            array = array if stacked else array[0]
            if leaf == "bias":
                module.bias[...] = array
            elif hasattr(module, "kernel"):
                module.kernel[...] = np.swapaxes(array, -1, -2)
            else:
                module.scale[...] = array


@st.composite
def settings_and_images(draw: st.DrawFn):
    # Few shapes, because every new one compiles; other sizes are in the golden cases.
    side = draw(st.sampled_from([3, 5]))
    name = draw(st.sampled_from(PRESETS))
    overrides = {"order": draw(st.sampled_from(["attention", "raster"]))}
    if name not in ("full", "select-only"):
        overrides["neighbours"] = draw(st.integers(1, 40))
        overrides["similarity"] = draw(st.sampled_from(["cosine", "dot"]))
        overrides["pool"] = draw(st.sampled_from(["all", "pruned"]))
        overrides["merge"] = draw(st.sampled_from(["sum", "mean", "none"]))
        overrides["extra_token"] = draw(st.booleans())
    if name != "prumerge+fixed" and name != "full":
        added = st.sampled_from(["none", "raster", "uniform", "lattice", "lattice_fixed"])
        overrides["added_patches"] = draw(added)
        overrides["min_tokens"] = draw(st.integers(0, 6))
        overrides["max_tokens"] = draw(st.sampled_from([None, 6]))
    images = random_batch(
        IMAGES, side * side, draw(st.sampled_from([3, 16])), seed=draw(st.integers(0, 2**31)),
        skew=draw(st.sampled_from([0.1, 1.0, 3.0])),
    )  # fmt: skip
    if draw(st.booleans()):  # coarse values: ties in attention and in similarity
        images = tuple(np.round(x * 4) / 4 for x in images[:2]) + (np.round(images[2], 2),)
    return prumerge.preset(name, **overrides), images


@settings(max_examples=15)
@given(settings_and_images())
def test_equals_the_loop_form(case) -> None:
    config, (hidden, keys, attention) = case
    got = reduce_tokens(hidden, keys, jnp.asarray(attention), config=config)
    for image in range(IMAGES):
        if config.count_rule == "iqr" and _is_on_the_threshold(attention[image], config):
            continue  # float32 and float64 may disagree on which side it lies
        tokens, entries = reduce_one(hidden[image], keys[image], attention[image], config)
        assert int(got.required[image]) == len(tokens)
        indices = np.full(got.patch_indices.shape[1], -1)
        indices[: len(entries)] = entries
        np.testing.assert_array_equal(got.patch_indices[image], indices)
        if config.similarity == "cosine" and _has_close_similarities(keys[image], config):
            continue  # float32 and float64 may rank a near-tie differently
        np.testing.assert_allclose(got.tokens[image, : len(tokens)], tokens, atol=2e-5)


def _is_on_the_threshold(attention: np.ndarray, config: prumerge.PruMergeConfig) -> bool:
    q1, q3 = np.percentile(attention.astype(np.float64), [25, 75])
    threshold = q3 + config.iqr_factor * (q3 - q1)
    near = np.abs(attention - threshold) < 1e-6 * max(threshold, 1e-6)
    return bool(near.any()) and q1 < q3  # equal quartiles are exact in either precision


def _has_close_similarities(keys: np.ndarray, config: prumerge.PruMergeConfig) -> bool:
    if config.merge == "none":
        return False
    unit = keys / np.maximum(np.linalg.norm(keys, axis=-1, keepdims=True), 1e-12)
    similarity = np.sort(unit.astype(np.float64) @ unit.astype(np.float64).T, axis=-1)
    return bool((np.diff(similarity, axis=-1) < 1e-6).any())


@pytest.mark.parametrize(
    "name",
    ["paper+", *(pytest.param(n, marks=pytest.mark.slow) for n in ("prumerge", "prumerge+fixed"))],
)
def test_an_image_is_on_its_own(name: str) -> None:
    """Bitwise the same in any batch; the same patches whatever B and R are."""
    config = prumerge.preset(name)
    hidden, keys, attention = random_batch(7, 144, 8, seed=3)
    alone = reduce_tokens(hidden[:1], keys[:1], attention[:1], config=config)
    among = reduce_tokens(hidden, keys, attention, config=config)
    other = [np.concatenate([x[:1], x[:0:-1] * 3]) for x in (hidden, keys, attention)]
    elsewhere = reduce_tokens(*other, config=config)
    length = int(alone.lengths[0])
    np.testing.assert_array_equal(among.tokens[0], elsewhere.tokens[0])
    for got in (among, elsewhere):
        assert int(got.lengths[0]) == length
        np.testing.assert_array_equal(got.patch_indices[0], alone.patch_indices[0])
        np.testing.assert_allclose(got.tokens[0], alone.tokens[0], atol=1e-6)
    for capacity in (length, 200):
        sized = dataclasses.replace(config, capacity=capacity)
        got = reduce_tokens(hidden, keys, attention, config=sized)
        assert int(got.lengths[0]) == length
        np.testing.assert_array_equal(
            got.patch_indices[0, :length], alone.patch_indices[0, :length]
        )
        np.testing.assert_allclose(got.tokens[0, :length], alone.tokens[0, :length], atol=1e-6)


def test_too_small_a_capacity_is_reported() -> None:
    hidden, keys, attention = random_batch(7, 144, 8)
    full = reduce_tokens(hidden, keys, attention, config=prumerge.preset("prumerge"))
    small = reduce_tokens(hidden, keys, attention, config=prumerge.preset("prumerge", capacity=5))
    np.testing.assert_array_equal(small.required, full.required)
    assert (np.asarray(small.lengths) == np.minimum(full.required, 5)).all()
    assert int(full.required.min()) > 5
    np.testing.assert_allclose(small.tokens, full.tokens[:, :5], atol=1e-6)


@pytest.mark.parametrize("name", ["prumerge", "prumerge+", "paper+", "select-only"])
def test_degenerate_attention(name: str) -> None:
    """No outlier, constant, one spike, ties: never a crash, at least `min_tokens` patches."""
    n = 64
    spike = np.full(n, 1e-3, np.float32)
    spike[37] = 0.5
    ties = np.full(n, 1e-3, np.float32)
    ties[[50, 9, 20]] = 0.3
    rows = np.stack(
        [np.full(n, 1 / n), np.zeros(n), np.linspace(0.01, 0.02, n), spike, ties]
    ).astype(np.float32)
    hidden, keys, _ = random_batch(len(rows), n, 8)
    config = prumerge.preset(name)
    got = reduce_tokens(hidden, keys, rows, config=config)
    expected = [[0], [0], [63], [37], [9, 20, 50]]
    for image, first in enumerate(expected):
        patches = np.asarray(got.patch_indices[image])
        np.testing.assert_array_equal(patches[: len(first)], first)
        assert np.isfinite(np.asarray(got.tokens[image])).all()
        tokens, entries = reduce_one(hidden[image], keys[image], rows[image], config)
        assert int(got.lengths[image]) == len(tokens)
        assert patches[: len(entries)].tolist() == entries


def test_no_outlier_and_no_minimum_leaves_the_extra_token() -> None:
    hidden, keys, _ = random_batch(1, 16, 4)
    flat = np.full((1, 16), 1 / 16, np.float32)
    got = reduce_tokens(hidden, keys, flat, config=prumerge.preset("prumerge", min_tokens=0))
    assert int(got.lengths[0]) == 1
    np.testing.assert_allclose(got.tokens[0, 0], hidden[0].mean(0), atol=1e-6)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_attention_that_is_not_finite_is_flagged(poison: float) -> None:
    hidden, keys, attention = random_batch(5, 64, 8)
    clean = reduce_tokens(hidden, keys, attention, config=prumerge.preset("prumerge+"))
    hidden[1], keys[1], attention[1, 5] = np.nan, np.nan, poison
    got = reduce_tokens(hidden, keys, attention, config=prumerge.preset("prumerge+"))
    assert int(got.required[1]) == -1
    assert int(got.lengths[1]) == 0
    assert not np.asarray(got.tokens[1]).any()
    assert (np.asarray(got.patch_indices[1]) == -1).all()
    for image in (0, 2, 3, 4):
        np.testing.assert_array_equal(got.tokens[image], clean.tokens[image])


def test_gradient_with_respect_to_token_values() -> None:
    """d tokens / d hidden equals finite differences; selection is constant under it."""
    hidden, keys, attention = random_batch(1, 36, 4, seed=7)
    config = prumerge.preset("prumerge+")
    project = np.random.default_rng(0).normal(size=(config.capacity_for(36), 4))

    @jax.jit
    def f(hidden: jax.Array) -> jax.Array:
        return (prumerge.reduce_tokens(hidden, keys, attention, config).tokens[0] * project).sum()

    gradient = jax.jit(jax.grad(f))(jnp.asarray(hidden))
    direction = np.random.default_rng(1).normal(size=hidden.shape).astype(np.float32)
    difference = (f(hidden + 0.5 * direction) - f(hidden - 0.5 * direction)) / 1.0
    np.testing.assert_allclose((gradient * direction).sum(), difference, rtol=1e-4)


def test_bfloat16_features_select_the_same_patches() -> None:
    hidden, keys, attention = random_batch(7, 144, 8, seed=9)
    config = prumerge.preset("prumerge")
    expected = reduce_tokens(hidden, keys, attention, config=config)
    got = reduce_tokens(jnp.asarray(hidden, jnp.bfloat16), keys, attention, config=config)
    assert got.tokens.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got.patch_indices, expected.patch_indices)
    np.testing.assert_allclose(
        got.tokens.astype(jnp.float32), expected.tokens, atol=0.03 * float(abs(hidden).max())
    )


@pytest.mark.parametrize(
    "name",
    ["prumerge+", *(pytest.param(n, marks=pytest.mark.slow) for n in ("prumerge+fixed", "paper+"))],
)
def test_sharded_over_the_batch_without_collective_or_sort(name: str) -> None:
    require_eight_devices()
    mesh = sharding.make_mesh(data=4, fsdp=2)
    images = random_batch(8, 64, 16, seed=13)
    placed = [
        jax.device_put(x, NamedSharding(mesh, sharding.logical_spec("batch"))) for x in images
    ]
    program = jax.jit(functools.partial(prumerge.reduce_tokens, config=prumerge.preset(name)))
    compiled = program.lower(*placed).compile()
    text = compiled.as_text()
    assert not re.findall(
        r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|\bsort\(|TopK", text
    )
    got, expected = compiled(*placed), program(*images)
    assert got.tokens.sharding.spec[0] == sharding.logical_spec("batch")[0]
    np.testing.assert_array_equal(got.patch_indices, expected.patch_indices)
    np.testing.assert_allclose(got.tokens, expected.tokens, atol=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_default_capacity_always_suffices(name: str) -> None:
    config = prumerge.preset(name)
    for seed, skew in ((0, 0.01), (1, 1.0), (2, 6.0)):
        hidden, keys, attention = random_batch(5, 64, 8, seed=seed, skew=skew)
        got = reduce_tokens(hidden, keys, attention, config=config)
        assert (np.asarray(got.required) <= config.capacity_for(64)).all()


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("prumerge++", {}, "unknown reduction"),
        ("prumerge", {"merge": "max"}, "merge is 'max'"),
        ("prumerge", {"ratio": 0}, "ratio is 0"),
        ("prumerge", {"capacity": 0}, "capacity is 0"),
        ("prumerge", {"min_tokens": 5, "max_tokens": 4}, "max_tokens is 4"),
        ("prumerge", {"neighbours": "8"}, "neighbours is '8'; expected an integer from 1"),
        ("prumerge", {"neighbours": True}, "neighbours is True"),
        ("prumerge", {"iqr_factor": float("nan")}, "iqr_factor is nan"),
        ("prumerge", {"iqr_factor": -1}, "iqr_factor is -1; expected a number from 0"),
        ("prumerge", {"extra_token": 1}, "extra_token is 1; expected True or False"),
        ("prumerge", {"neighbors": 8}, "'neighbors'; did you mean 'neighbours'?"),
    ],
)
def test_wrong_settings_are_refused(name: str, overrides: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        prumerge.preset(name, **overrides)
