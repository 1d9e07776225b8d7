"""Products of activations with the kernels of linear layers."""

import jax
import jax.numpy as jnp

FEW_ROWS = 64
"""Products of fewer rows than this with a weight [d_out, d_in] are sums over its last axis; XLA's
matrix product on CPUs rearranges the weight for as many rows as it may get."""


def contract(x: jax.Array, kernel: jax.Array, *, out_first: bool) -> jax.Array:
    """`x W`, [..., d_in] -> [..., d_out].

    Args:
      x: activations.
      kernel: [d_in, d_out] in the dtype of `x`; [d_out, d_in] with `out_first`.
      out_first: which of them.
    """
    if not out_first:
        return x @ kernel
    rows = x.reshape(-1, x.shape[-1])
    if 1 < len(rows) < FEW_ROWS and x.dtype == jnp.float32:
        y = (rows[:, None] * kernel).sum(-1)
        return y.reshape(*x.shape[:-1], -1)
    return jnp.einsum("...i,oi->...o", x, kernel)
