"""Kernels of fewer bits: the formulas to the bit, products, layouts, meshes, adapters on top."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prumerge_jax.models.config import TextConfig
from prumerge_jax.models.layers import AdapterConfig, Linear, stack
from prumerge_jax.models.quantisation import (
    FORMATS,
    NF4_CODES,
    Quantised,
    QuantParam,
    dequantise,
    format_named,
    product,
    quantise,
)
from prumerge_jax.models.quantised_weights import check_blocks
from prumerge_jax.sharding.mesh import make_mesh, use_mesh, weight_shardings

RNG = np.random.default_rng(0)
KERNEL = RNG.standard_t(4, (96, 24)).astype(np.float32)  # NF4's second block is half of one
KERNEL[:, 3] = 0  # a channel without weights
INPUTS = RNG.normal(size=(3, 5, 96)).astype(np.float32)
NAMES = sorted(FORMATS)


def oracle(name: str, kernel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales by the published formulas, in NumPy; int4's scale is searched by
    `least_error`."""
    if name == "nf4":
        blocks = np.pad(kernel, ((0, 32), (0, 0))).reshape(-1, 64, kernel.shape[1])
        scale = np.abs(blocks).max(1)
        scale[scale == 0] = 1
        distances = np.abs((blocks / scale[:, None])[..., None] - NF4_CODES)
        return distances.argmin(-1).reshape(-1, kernel.shape[1])[: len(kernel)], scale
    steps, low = (7, -8) if name == "int4" else (127, -127)
    scale = np.abs(kernel).max(0, keepdims=True) * np.float32(1 / steps)
    scale[scale == 0] = 1
    if name == "int4":
        scale = least_error(kernel, scale)
    return np.clip(np.rint(kernel / scale), low, steps), scale


def least_error(kernel: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Of the 21 scales from all to half of `largest` those of least squared error."""
    shares = np.linspace(1, 0.5, 21, dtype=np.float32)
    scales = shares[:, None, None] * largest
    errors = [
        np.square(np.clip(np.rint(kernel / s), -8, 7) * s - kernel).astype(np.float64).sum(0)
        for s in scales
    ]
    return np.take_along_axis(scales[:, 0], np.argmin(errors, 0)[None], 0)


def expanded(name: str, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
    values = NF4_CODES[codes] if name == "nf4" else codes.astype(np.float32)
    return values * np.repeat(scale, 64 if name == "nf4" else len(codes), 0)[: len(codes)]


@pytest.mark.parametrize("name", NAMES)
def test_codes_and_scales_are_the_formulas_to_the_bit(name: str) -> None:
    form = FORMATS[name]
    stacked = quantise(jnp.stack([jnp.asarray(KERNEL), 2 * jnp.asarray(KERNEL)]), form)
    codes, scale = oracle(name, KERNEL)
    assert stacked.codes.dtype == form.codes
    np.testing.assert_array_equal(np.asarray(stacked.codes[0]).astype(np.int32), codes)
    np.testing.assert_array_equal(np.asarray(stacked.scale[0]), scale)
    np.testing.assert_array_equal(stacked.scale[1, :, 4], 2 * stacked.scale[0, :, 4])
    np.testing.assert_array_equal(
        dequantise(Quantised(stacked.codes[0], stacked.scale[0]), form),
        expanded(name, codes.astype(np.int32), scale),
    )


# Relative rms error of a normal matrix; docs/quantisation.md.
@pytest.mark.parametrize(("name", "expected"), [("int8", 0.0083), ("int4", 0.108), ("nf4", 0.0917)])
def test_the_error_of_normal_weights(name: str, expected: float) -> None:
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(1024, 256)), jnp.float32)
    error = dequantise(quantise(kernel, FORMATS[name]), FORMATS[name]) - kernel
    assert jnp.sqrt(jnp.square(error).mean()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "out_first"), [(3, False), (3, True), (70, True)])
def test_products(name: str, rows: int, out_first: bool) -> None:
    form = FORMATS[name]
    kernel = quantise(jnp.asarray(KERNEL), form)
    weight = np.asarray(dequantise(kernel, form))
    x = np.resize(INPUTS, (rows, 96))
    expected = x @ weight
    if form.dynamic:
        of_token = np.abs(x).max(-1, keepdims=True) / np.float32(127)
        expected = np.rint(x / of_token) * of_token @ weight
    if out_first:
        kernel = Quantised(kernel.codes.T, kernel.scale.T)
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.02), (jnp.float16, 4e-3)):
        y = product(jnp.asarray(x, dtype), kernel, form, out_first=out_first)
        assert y.dtype == dtype
        np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def test_a_token_has_its_own_scale() -> None:
    kernel = quantise(jnp.asarray(KERNEL), FORMATS["int8x8"])
    alone = product(jnp.asarray(INPUTS[0]), kernel, FORMATS["int8x8"], out_first=False)
    x = INPUTS[0].copy()
    x[1:] = np.nan
    beside = product(jnp.asarray(x), kernel, FORMATS["int8x8"], out_first=False)
    np.testing.assert_array_equal(alone[0], beside[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8x8", "int4", "nf4"])
def test_layers_in_a_scan_on_a_mesh_with_adapters(name: str) -> None:
    form, layers = FORMATS[name], 2

    def make(rngs: nnx.Rngs) -> Linear:
        adapter = AdapterConfig(rank=4, alpha=8.0)
        return Linear(256, 32, ("mlp", "embed"), adapter=adapter, quantize=form, rngs=rngs)

    def run(graphdef: nnx.GraphDef, state: nnx.State, x: jax.Array) -> jax.Array:
        def body(x: jax.Array, layer: nnx.State) -> tuple[jax.Array, None]:
            return jnp.tile(nnx.merge(graphdef, layer)(x), 8), None

        return jax.lax.scan(body, x, state)[0]

    with nnx.use_eager_sharding(False):
        graphdef, state = nnx.split(stack(make, layers, nnx.Rngs(0)))
    leaves = dict(nnx.to_flat_state(state))
    assert isinstance(leaves["kernel_q",], QuantParam)
    assert leaves["kernel_q",].shape == (layers, 256, 32)
    assert leaves["kernel_scale",].shape == (layers, form.groups(256), 32)
    leaves["lora_b",][...] = jnp.ones(leaves["lora_b",].shape)
    x = jnp.asarray(np.resize(INPUTS, (4, 256)))
    alone = jax.jit(run, static_argnums=0)(graphdef, state, x)
    gradient = jax.grad(lambda x: run(graphdef, state, x).sum())(x)
    assert jnp.isfinite(gradient).all()
    mesh = make_mesh(2, 2, 2)
    with use_mesh(mesh):
        placed = jax.device_put(state, weight_shardings(state, mesh))
        assert not placed["kernel_q"][...].sharding.is_fully_replicated
        sharded = jax.jit(run, static_argnums=0)(graphdef, placed, x)
    np.testing.assert_allclose(sharded, alone, rtol=1e-5, atol=1e-5 * np.abs(alone).max())


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="unknown format 'int3'.*int4"):
        format_named("int3")
    text = TextConfig(width=256, mlp_width=11008)
    check_blocks(text, FORMATS["nf4"], {"fsdp": 4, "tensor": 4})
    check_blocks(text, FORMATS["int4"], {"fsdp": 8, "tensor": 8})
    with pytest.raises(ValueError, match="down_proj has 172 blocks of 64.*over tensor=8"):
        check_blocks(text, FORMATS["nf4"], {"fsdp": 1, "tensor": 8})
