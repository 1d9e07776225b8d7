"""Masks for dropout: random bits cheap enough to be regenerated wherever they are read.

Drawn with JAX's Threefry, the masks of LoRA's dropout take an eighth of a training step on a TPU,
and they have to be kept in memory between their uses. Here a mask is a few operations per element
that XLA fuses into whatever reads it, and an element depends on the key and its own index alone,
so that a mesh and one device drop the same.
"""

import math

import jax
import jax.numpy as jnp


def bernoulli_mask(key: jax.Array, probability: float, shape: tuple[int, ...]) -> jax.Array:
    """Independent draws, true with this probability.

    The last index and the others together are hashed with the key each, and the two hashes with
    each other.

    Args:
      key: a key of `jax.random`.
      probability: how likely an element is true, 0 to 1.
      shape: shape of the activations, [..., D].

    Returns:
      [..., D] bool.
    """
    first, second = jax.random.key_data(key)[:2]  # four words of some generators say it twice
    *leading, width = shape
    row = jax.lax.iota(jnp.uint32, math.prod(leading)).reshape(leading)
    rows = _hashed(row ^ first) ^ second
    columns = _hashed(jax.lax.iota(jnp.uint32, width) ^ second) ^ first
    # One multiplication of the two hashes together: its upper bits, which decide, depend on all.
    bits = (_hashed(rows)[..., None] ^ _hashed(columns)) * jnp.uint32(0x9E3779B1)
    return bits < jnp.uint32(min(round(probability * 2**32), 2**32 - 1))


def _hashed(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every bit of `x` turns half the bits of the result.

    The constants are `lowbias32` of github.com/skeeto/hash-prospector.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
