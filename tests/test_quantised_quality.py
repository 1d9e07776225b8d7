"""`benchmarks/quantised_quality.py`: its figures, and what it refuses."""

import importlib
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prumerge_jax.engine.encoding import PlacedModel
from prumerge_jax.models.quantisation import FORMATS

BENCHMARKS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"
RNG = np.random.default_rng(0)
PLAIN = RNG.normal(size=(6, 320)).astype(np.float32)


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("quantised_quality")


@pytest.fixture
def plain(quality: types.ModuleType) -> PlacedModel:
    config, dtype = quality.geometry("tiny"), jnp.dtype(jnp.float32)
    return PlacedModel(*quality.random_llava(config, dtype), config, dtype)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_kl_is_that_of_float64_however_small(quality: types.ModuleType, size: float) -> None:
    other = PLAIN + np.float32(size) * RNG.normal(size=PLAIN.shape).astype(np.float32)
    p, q = log_softmax(4 * PLAIN), log_softmax(4 * other)
    expected = (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(quality.divergence(PLAIN, other, 4.0), expected, rtol=1e-3)


def test_logits_are_scaled_to_an_entropy(quality: types.ModuleType) -> None:
    scale = quality.scale_for(1.7, [PLAIN[:3], PLAIN[3:]])
    p = log_softmax(scale * PLAIN)
    assert -(np.exp(p) * p).sum(-1).mean() == pytest.approx(1.7, abs=1e-3)
    assert scale > 2  # as drawn they are nearly flat


def test_kl_with_a_reduction_is_compared_text_by_text(quality: types.ModuleType) -> None:
    first, second = np.array([[1.0, 3.0], [2.0, 2.0]]), np.array([[2.0, 4.0], [3.0, 3.0]])
    found, of_first = (quality.Divergence(kl, kl / 2, kl > 2) for kl in (second, first))
    row = quality.row(found, of_first)
    assert (row["kl_mean"], row["as_drawn_kl_mean"], row["same"]) == (3, 1.5, 0.75)
    assert row["kl_more"] == row["kl_more_low"] == row["kl_more_high"] == 1


@pytest.mark.slow
def test_what_a_format_must_leave_alone_and_must_not(
    quality: types.ModuleType, plain: PlacedModel
) -> None:
    form = FORMATS["nf4"]
    model = quality.in_format(plain, form)
    about = quality.check_structure(plain, model, form)
    assert about["kernel_error"] == pytest.approx(0.092, rel=0.05)
    assert about["blocks_mb"] == pytest.approx(about["planned_mb"], rel=0.05)  # tiny blocks

    def with_weights(change: dict) -> PlacedModel:
        weights = dict(nnx.to_flat_state(model.state)) | change
        state = nnx.from_flat_state({path: each for path, each in weights.items() if each})
        return PlacedModel(model.graphdef, state, model.config, model.dtype)

    weights = dict(nnx.to_flat_state(model.state))
    path = ("projector", "linear_0", "kernel")
    altered = jax.tree.map(lambda weight: weight + 1e-6, weights[path])
    with pytest.raises(ValueError, match=r"nf4 alters projector\.linear_0\.kernel"):
        quality.check_structure(plain, with_weights({path: altered}), form)
    left = ("decoder", "layers", "mlp", "up_proj")
    kernel = dict(nnx.to_flat_state(plain.state))[*left, "kernel"]
    unquantised = {
        (*left, "kernel_q"): None,
        (*left, "kernel_scale"): None,
        (*left, "kernel"): kernel,
    }
    with pytest.raises(ValueError, match="nf4: quantised are"):
        quality.check_structure(plain, with_weights(unquantised), form)
    wide = jax.tree.map(lambda codes: codes.astype(jnp.uint8), weights[*left, "kernel_q"])
    with pytest.raises(ValueError, match=r"nf4: kernels have [\d,.]+ bytes, expected"):
        quality.check_structure(plain, with_weights({(*left, "kernel_q"): wide}), form)
