"""Rotary positions: what they mean, and that every platform's form of them is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prumerge_jax.models import rotary, tuning
from prumerge_jax.models.config import published

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
