"""Integers of four bits, two per byte along the last axis: the first of a pair in the low half.

NumPy gives each a byte of its own; files have them packed.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

_PACKED = (jnp.dtype(jnp.int4), jnp.dtype(jnp.uint4))


def is_packed(dtype: np.dtype) -> bool:
    """Whether files hold two numbers of this dtype per byte."""
    return dtype in _PACKED


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the bytes.

    Raises:
      ValueError: the last axis is odd.
    """
    if not shape or shape[-1] % 2:
        raise ValueError(f"4-bit integers of shape {shape} do not pair along the last axis")
    return (*shape[:-1], shape[-1] // 2)


def pack(array: Any) -> Any:
    """Numbers of four bits [..., n] -> uint8 [..., n / 2], of NumPy or of JAX."""
    packed_shape(array.shape)
    bits = array.astype(jnp.int8).astype(jnp.uint8) & 15
    return bits[..., ::2] | bits[..., 1::2] << 4


def unpack(packed: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """uint8 [..., n] -> numbers of four bits [..., 2 n]."""
    bits = np.empty((*packed.shape[:-1], 2 * packed.shape[-1]), np.uint8)
    bits[..., ::2], bits[..., 1::2] = packed & 15, packed >> 4
    if dtype == jnp.int4:
        bits = ((bits << 4).view(np.int8) >> 4).view(np.uint8)
    return bits.view(dtype)
