"""Adapters of one input computed together: what they would add alone, and one mask for all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prumerge_jax.models import tuning
from prumerge_jax.models.dropout import bernoulli_mask
from prumerge_jax.models.layers import AdapterConfig, Linear, LoRAParam, outputs_of
from prumerge_jax.models.tuning import Tuning

RANK, ALPHA, DROPOUT = 4, 6.0, 0.25


@pytest.fixture(scope="module")
def linears() -> list[Linear]:
    """Three of different widths, two of them with a bias, none of their factors zero."""
    rngs = nnx.Rngs(0)
    adapter = AdapterConfig(RANK, ALPHA, DROPOUT)
    made = []
    for d_out, bias in ((12, True), (8, False), (20, True)):
        axes = ("embed", "heads")
        with nnx.use_eager_sharding(False):
            linear = Linear(16, d_out, axes, bias=bias, adapter=adapter, rngs=rngs)
        linear.lora_b[...] = jax.random.normal(rngs.params(), linear.lora_b.shape)
        if linear.bias is not None:
            linear.bias[...] = jax.random.normal(rngs.params(), (d_out,))
        made.append(linear)
    return made


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("key", [None, 7])
def test_together_is_each_by_the_formula(
    linears: list[Linear], apart: bool, key: int | None
) -> None:
    """Outputs and the gradients of the input and of both factors."""
    x = jax.random.normal(jax.random.key(1), (2, 3, 16))
    dropout_key = None if key is None else jax.random.key(key)
    graphdef, factors, others = nnx.split(linears, LoRAParam, ...)

    def by_the_formula(linear: Linear, x: jax.Array) -> jax.Array:
        dropped, scale = x, ALPHA / RANK
        if dropout_key is not None:
            dropped = x * bernoulli_mask(dropout_key, 1 - DROPOUT, x.shape) / (1 - DROPOUT)
        y = x @ linear.kernel[...] + scale * dropped @ linear.lora_a[...] @ linear.lora_b[...]
        return y if linear.bias is None else y + linear.bias[...]

    def total(factors: nnx.State, x: jax.Array, together: bool) -> tuple[jax.Array, list]:
        layers = nnx.merge(graphdef, factors, others)
        if together:
            outputs = outputs_of(layers, x, dropout_key)
        else:
            outputs = [by_the_formula(linear, x) for linear in layers]
        return sum(jnp.sin(y).sum() for y in outputs), outputs

    with tuning.use(Tuning(adapter_barrier=apart)):
        run = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True), static_argnums=2)
        ours, theirs = (run(factors, x, together) for together in (True, False))
    for got, expected in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
