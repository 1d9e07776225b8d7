"""Draws of dropout: as often as asked, independent, the same on every device."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prumerge_jax import sharding
from prumerge_jax.models.dropout import bernoulli_mask
from tests.conftest import require_eight_devices

SHAPE = (2, 512, 1024)
KEYS = [key for seed in range(3) for key in jax.random.split(jax.random.key(seed), 2)]


def deviations(probability: float) -> np.ndarray:
    """Deviations of every key's draws from their mean, in standard deviations, [keys, rows, D]."""
    draws = np.stack([bernoulli_mask(key, probability, SHAPE) for key in KEYS])
    scale = np.sqrt(probability * (1 - probability))
    return ((draws - probability) / scale).reshape(len(KEYS), -1, SHAPE[-1])


@pytest.mark.parametrize("probability", [0.95, 0.5, 0.1])
def test_draws_are_as_frequent_as_asked_in_all_rows_and_columns(probability: float) -> None:
    x = deviations(probability)
    for axes in [(1, 2), (1,), (2,)]:
        count = np.prod([x.shape[axis] for axis in axes])
        means = x.mean(axis=axes) * np.sqrt(count)
        # Means of a standard normal: as wide as that, and no outliers.
        assert means.std() == pytest.approx(1, abs=4 / np.sqrt(2 * means.size))
        assert np.abs(means).max() < 5.5


@pytest.mark.parametrize("probability", [0.95, 0.5])
def test_draws_are_independent(probability: float) -> None:
    """Draws are independent of other keys' draws, of their neighbours, and over the corners of
    rectangles, which a hash of sums of rows and columns would tie together."""
    x = deviations(probability)
    products = [a * b for a, b in itertools.combinations(x, 2)]
    for step in (1, 2, 128):
        products += [x[:, step:] * x[:, :-step], x[..., step:] * x[..., :-step]]
        pairs = x[:, step:] * x[:, :-step]
        products.append(pairs[..., step:] * pairs[..., :-step])
    for product in products:
        assert abs(product.mean()) * np.sqrt(product.size) < 5


def test_a_mesh_draws_the_same() -> None:
    require_eight_devices()
    key = jax.random.key(3)

    def program() -> Callable[[jax.Array], jax.Array]:
        """Another function each time: what was traced without a mesh is not used on one."""
        return jax.jit(
            lambda key: sharding.constrain(
                bernoulli_mask(key, 0.5, (8, 16, 32)), "batch", None, "mlp"
            )
        )

    expected = program()(key)
    with sharding.use_mesh(sharding.make_mesh(2, 2, 2)):
        got = program()(key)
    assert not got.sharding.is_fully_replicated
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(
        bernoulli_mask(key, 0.5, (128, 32)), jnp.reshape(expected, (128, 32))
    )
