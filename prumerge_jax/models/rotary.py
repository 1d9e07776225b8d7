"""Rotary position embedding (arXiv 2104.09864), pairing dimensions as Hugging Face does."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prumerge_jax.models import tuning
from prumerge_jax.models.config import TextConfig


class Rotation(NamedTuple):
    """The rotation of heads at some positions, [B, T, Dh] float32 each.

    Attributes:
      cos: cosines; both halves of the last axis have the same angles.
      sin: sines, negated in the first half.
    """

    cos: jax.Array
    sin: jax.Array

    def times(self, factor: float) -> "Rotation":
        """What it rotates, multiplied by a factor."""
        return Rotation(self.cos * factor, self.sin * factor)


def rotation(positions: jax.Array, config: TextConfig) -> Rotation:
    """The rotation of positions [B, T]."""
    angle = positions[..., None].astype(jnp.float32) * frequencies(config)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return Rotation(jnp.concatenate([cos, cos], axis=-1), jnp.concatenate([-sin, sin], axis=-1))


@jax.named_scope("rotary")
def rotate(x: jax.Array, by: Rotation) -> jax.Array:
    """Rotates heads [B, T, H, Dh], pairing dimension i with i + Dh/2."""
    cos, sin = (part[:, :, None, :] for part in by)
    swapped = swap_halves(x, tuning.current().rotary)
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)


def swap_halves(x: jax.Array, form: Literal["roll", "matmul"]) -> jax.Array:
    """[B, T, H, Dh] -> float32, the two halves of the last axis in each other's place."""
    half = x.shape[-1] // 2
    if form == "roll":
        return jnp.roll(x.astype(jnp.float32), half, axis=-1)
    # A permutation: exact, since every sum has one term that is not zero. A TPU's matrix unit moves
    # lanes faster than its vector unit does.
    order = jnp.roll(jnp.eye(2 * half, dtype=x.dtype), half, axis=-1)
    return jnp.einsum("bthd,de->bthe", x, order, precision="highest").astype(jnp.float32)


def frequencies(config: TextConfig) -> np.ndarray:
    """Radians per position of every pair of dimensions, [Dh / 2] float32.

    On the host in float32, as PyTorch has them: one unit in the last place of a frequency moves a
    cosine at position 31,000 by 1e-3.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    plain = np.float32(1) / np.float32(config.rope_theta) ** exponents
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    slowed = plain / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return slowed
    # Turns within the length of pre-training: many keep their frequency, few are slowed.
    turns = scaling.original_max_positions * plain / np.float32(2 * np.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = np.clip((turns - scaling.low_freq_factor) / span, 0, 1).astype(np.float32)
    return (1 - kept) * slowed + kept * plain
