"""Products of activations with the kernels of linear layers."""

import jax
import jax.numpy as jnp

from prumerge_jax.models import tuning

FEW_ROWS = 64
"""Fewer rows than this are the right-hand side of a product with a weight [d_out, d_in]: XLA's
matrix product on CPUs rearranges its right-hand side, however large."""


def contract(x: jax.Array, kernel: jax.Array, *, out_first: bool) -> jax.Array:
    """`x W`, [..., d_in] -> [..., d_out].

    Args:
      x: activations.
      kernel: [d_in, d_out] in the dtype of `x`; [d_out, d_in] with `out_first`.
      out_first: which of them.
    """
    return out_first_product(x, kernel) if out_first else x @ kernel


def out_first_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x W^T` for x [..., d_in] and a weight [d_out, d_in]."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) >= FEW_ROWS or tuning.current().kernels != "out_first":
        return jnp.einsum("...i,oi->...o", x, kernel)
    product = jnp.einsum("oi,ri->or", kernel, rows)
    # Without the barrier XLA would exchange the sides, and have no transposition left to do.
    product = jax.lax.optimization_barrier(product)
    return product.T.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def computed_apart(x: jax.Array) -> jax.Array:
    """`x`, computed once and kept, and not again as a part of what reads it; its gradient is
    computed as always."""
    return jax.lax.optimization_barrier(x)


computed_apart.defvjp(lambda x: (computed_apart(x), None), lambda _, gradient: (gradient,))
