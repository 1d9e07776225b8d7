"""Rotary positions: what they mean, and that every platform's form of them is the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prumerge_jax.models import llama
from prumerge_jax.models.config import published

CONFIG = published("tiny").text


def heads(dtype: str = "float32", positions: int = 5) -> jax.Array:
    """Random heads [2, positions, 3, Dh]."""
    values = np.random.default_rng(0).standard_normal((2, positions, 3, CONFIG.head_dim))
    return jnp.asarray(values, dtype)


def test_scores_depend_on_distance_alone() -> None:
    q, k = heads(positions=1), heads(positions=2)[:, 1:]

    def score(q_at: int, k_at: int) -> jax.Array:
        at = [llama.rotary(jnp.full((2, 1), position), CONFIG) for position in (q_at, k_at)]
        return jnp.sum(llama.rotate(q, at[0]) * llama.rotate(k, at[1]), axis=-1)

    np.testing.assert_allclose(score(7, 4), score(1203, 1200), atol=2e-3)
    np.testing.assert_allclose(score(5, 5), jnp.sum(q * k, axis=-1), atol=1e-5)
    assert np.abs(score(7, 4) - score(7, 5)).max() > 0.01


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tpu_moves_halves_by_products_exactly(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = heads(dtype)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    expected = jnp.concatenate([second, first], axis=-1)
    np.testing.assert_array_equal(llama.swapped(x), expected)
    monkeypatch.setattr(llama, "platform", lambda: "tpu")
    np.testing.assert_array_equal(llama.swapped(x), expected)
    lowered = jax.jit(llama.swapped).lower(x).as_text()
    assert "dot_general" in lowered
    assert "HIGHEST" in lowered
