"""Draws of the next token against softmax by hand."""

import jax.numpy as jnp
import numpy as np

from prumerge_jax.engine.sampling import Sampling, draw
from prumerge_jax.models.config import MAX_STOP_IDS


def test_draws_follow_the_distribution() -> None:
    """Frequencies of 4,000 draws, against softmax by hand, with and without a nucleus."""
    logits = np.array([2.0, 1.0, 0.5, -1.0], np.float32)
    count = 4000
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.8), (1.0, 1e-6)):
        sampling = Sampling(
            jnp.full(count, temperature, jnp.float32),
            jnp.full(count, top_p, jnp.float32),
            jnp.arange(count, dtype=jnp.uint32),
            jnp.full((count, MAX_STOP_IDS), -1),
        )
        tokens = draw(jnp.tile(logits, (count, 1)), sampling, jnp.zeros(count, jnp.int32))
        expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
        kept = np.cumsum(expected) - expected < top_p  # the logits descend
        expected = np.where(kept, expected, 0) / expected[kept].sum()
        frequencies = np.bincount(np.asarray(tokens), minlength=4) / count
        np.testing.assert_allclose(frequencies, expected, atol=0.03)
        assert (frequencies[expected == 0] == 0).all()
