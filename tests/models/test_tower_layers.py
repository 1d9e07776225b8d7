"""Running scores over the layers of the tower."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prumerge_jax import reductions
from prumerge_jax.data import images
from prumerge_jax.models import attention, tuning
from prumerge_jax.models.attention import splash
from prumerge_jax.models.layers import stack
from prumerge_jax.models.llava import gather_evidence, normalize_pixels
from prumerge_jax.models.tower_layers import run_layers
from prumerge_jax.reductions import evolution
from tests.tiny_llava import CONFIG, random_llava


class Layer(nnx.Module):
    """Adds a product with random weights."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.kernel = nnx.Param(rngs.params.normal((6, 6)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + jnp.tanh(x @ self.kernel[...])


def test_the_score_runs_through_the_upper_half_of_the_tower() -> None:
    layers = stack(lambda rngs: Layer(rngs), 5, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 1 + 12, 6))
    watch = reductions.parse("evocut").watch
    outputs = run_layers(layers, x, num_layers=6, first_patch=1, remember=True, watch=watch)
    score = jnp.zeros((2, 12))
    for number, kernel in enumerate(layers.kernel[...]):
        before, x = x, x + jnp.tanh(x @ kernel)
        if number >= 3:
            score = evolution.update_score(score, before[:, 1:], x[:, 1:])
    np.testing.assert_allclose(outputs.hidden, x, atol=1e-5)
    np.testing.assert_allclose(outputs.before_last, before, atol=1e-5)
    np.testing.assert_allclose(outputs.watched, score, atol=1e-6)
    assert float(score.max()) > 0


def test_a_tower_that_is_watched_shows_the_same_features() -> None:
    vision, side = random_llava(CONFIG).vision, CONFIG.vision.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    watched, baseline, plain = (
        gather_evidence(vision, pixels, reductions.parse(name), dtype=jnp.float32)
        for name in ("evocut:tokens=3", "evocut:tokens=3,ranking=random", "prumerge")
    )
    np.testing.assert_array_equal(watched.hidden, plain.hidden)
    np.testing.assert_array_equal(watched.watched, baseline.watched)
    assert watched.watched.shape == (2, CONFIG.vision.num_patches)
    assert plain.watched is None


def test_all_levels_become_the_bits_of_the_reference() -> None:
    levels = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3)
    plain = dataclasses.replace(CONFIG.vision, pixel_mean=(0.0,) * 3, pixel_std=(1.0,) * 3)
    scaled = jax.jit(lambda pixels: normalize_pixels(pixels, plain))(levels)
    np.testing.assert_array_equal(scaled, (levels * (1 / 255)).astype(np.float32))
    vision = CONFIG.vision
    np.testing.assert_allclose(
        jax.jit(lambda pixels: normalize_pixels(pixels, vision))(levels),
        images.normalize(levels, vision.pixel_mean, vision.pixel_std),
        rtol=3e-7,
        atol=3e-7,
    )


def test_blocks_of_the_kernel_are_filled_before_the_projections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """17 tokens become 128, of which the others see nothing."""
    config = dataclasses.replace(
        CONFIG, vision=dataclasses.replace(CONFIG.vision, width=128, num_heads=2)
    )
    vision, side = random_llava(config).vision, config.vision.image_size
    pixels = jax.random.normal(jax.random.key(0), (2, side, side, 3))
    expected = vision(pixels).hidden
    assert expected.shape[1] % 128
    lengths = []

    def spy(q: jax.Array, *arguments: Any, **options: Any) -> jax.Array:
        lengths.append(q.shape[1])
        return splash.attend(q, *arguments, **options)

    monkeypatch.setitem(attention._BACKENDS, "splash", spy)
    with tuning.use(tuning.Tuning(attention="splash")):
        found = vision(pixels).hidden
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert set(lengths) == {128}


def test_the_attention_of_either_layer_and_of_either_kind_of_heads() -> None:
    """As the tower's own attention computes it, and as the reference does."""
    vision, side = random_llava(CONFIG).vision, CONFIG.vision.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    features = vision(normalize_pixels(pixels, CONFIG.vision), feature_layer=True)
    heads = CONFIG.vision.num_heads
    found = {}
    for layer, query, keys in (
        ("23", features.queries[:, 0], features.keys),
        ("22", features.feature_query, features.feature_keys),
    ):
        for kind, number in (("wide", 1), ("mean", heads)):
            q, k = (
                query.reshape(2, number, -1),
                keys.reshape(2, -1, number, CONFIG.vision.width // number),
            )
            logits = jnp.einsum("bhd,bnhd->bhn", q, k, precision="highest") * q.shape[-1] ** -0.5
            expected = jax.nn.softmax(logits, axis=-1).mean(1)[:, 1:]
            reduction = reductions.parse(f"prumerge:layer={layer},heads={kind}")
            evidence = gather_evidence(vision, pixels, reduction, dtype=jnp.float32)
            found[layer, kind] = np.asarray(reduction.attention(evidence))
            np.testing.assert_allclose(found[layer, kind], expected, atol=1e-6)
    values = list(found.values())
    assert not any(np.allclose(x, y, atol=1e-4) for x, y in itertools.combinations(values, 2))
