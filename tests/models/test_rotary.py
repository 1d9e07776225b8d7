"""Rotary positions: what they mean, and that every platform's form of them is the same."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prumerge_jax.models import rotary, tuning
from prumerge_jax.models.config import RopeScaling, TextConfig, published

CONFIG = published("tiny").text


def heads(dtype: str = "float32", positions: int = 5) -> jax.Array:
    """Random heads [2, positions, 3, Dh]."""
    values = np.random.default_rng(0).standard_normal((2, positions, 3, CONFIG.head_dim))
    return jnp.asarray(values, dtype)


def test_scores_depend_on_distance_alone() -> None:
    q, k = heads(positions=1), heads(positions=2)[:, 1:]

    def score(q_at: int, k_at: int) -> jax.Array:
        at = [rotary.rotation(jnp.full((2, 1), position), CONFIG) for position in (q_at, k_at)]
        return jnp.sum(rotary.rotate(q, at[0]) * rotary.rotate(k, at[1]), axis=-1)

    np.testing.assert_allclose(score(7, 4), score(1203, 1200), atol=2e-3)
    np.testing.assert_allclose(score(5, 5), jnp.sum(q * k, axis=-1), atol=1e-5)
    assert np.abs(score(7, 4) - score(7, 5)).max() > 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_move_halves_exactly(dtype: str) -> None:
    x = heads(dtype)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    expected = jnp.concatenate([second, first], axis=-1)
    for form in ("roll", "matmul"):
        np.testing.assert_array_equal(rotary.swap_halves(x, form), expected)
    at = rotary.rotation(jnp.arange(5)[None], CONFIG)
    lowered = {}
    for platform, chosen in tuning.BY_PLATFORM.items():
        with tuning.use(chosen):
            lowered[platform] = jax.jit(rotary.rotate).lower(x, at).as_text()
    assert "dot_general" not in lowered["cpu"]
    assert "dot_general" in lowered["tpu"]
    assert "HIGHEST" in lowered["tpu"]


# theta, head width and scaling of every table in golden models/rope/rope.npz.
GOLDEN = {
    "default_1e4_d128": (1e4, 128, None),
    "default_5e5_d128": (5e5, 128, None),
    "default_1e6_d128": (1e6, 128, None),
    "default_1e6_d64": (1e6, 64, None),
    "linear_4_d128": (1e4, 128, RopeScaling("linear", 4.0)),
    "llama3_8_d128": (5e5, 128, RopeScaling("llama3", 8.0)),
    "llama3_32_d64": (5e5, 64, RopeScaling("llama3", 32.0)),
    "llama3_tiny_d12": (5e5, 12, RopeScaling("llama3", 8.0, original_max_positions=64)),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_tables(golden: pathlib.Path, name: str) -> None:
    """Frequencies, cosines and sines of transformers, far beyond the lengths of pre-training."""
    theta, head_dim, scaling = GOLDEN[name]
    config = TextConfig(head_dim=head_dim, rope_theta=theta, rope_scaling=scaling)
    tables = np.load(golden / "models/rope/rope.npz")
    expected = tables[f"{name}/inv_freq"]
    np.testing.assert_allclose(rotary.frequencies(config), expected, rtol=1e-6)
    positions = tables["positions"]
    got = rotary.rotation(jnp.asarray(positions)[None], config)
    half = head_dim // 2
    for row, position in enumerate(positions):
        atol = 5e-5 if position <= 500 else 1e-3 if position <= 8191 else 3e-3
        np.testing.assert_allclose(got.cos[0, row], tables[f"{name}/cos"][row], atol=atol)
        np.testing.assert_allclose(
            got.sin[0, row, half:], tables[f"{name}/sin"][row, half:], atol=atol
        )
