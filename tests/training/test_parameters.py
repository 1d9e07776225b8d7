"""Flat weights, and which of them train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prumerge_jax.models.config import published
from prumerge_jax.models.layers import AdapterConfig
from prumerge_jax.models.llava import LlavaModel
from prumerge_jax.sharding.mesh import make_mesh
from prumerge_jax.training.parameters import Template, trained_paths

TEMPLATE = Template.of(
    lambda seed: LlavaModel(published("tiny"), adapter=AdapterConfig(rank=2), rngs=nnx.Rngs(seed))
)


def test_patterns_name_what_trains() -> None:
    rates = trained_paths(TEMPLATE.variables, (("decoder.*.lora_?", 2e-4), ("projector.*", 2e-5)))
    adapters = {path for path in TEMPLATE.variables if "lora_" in path}
    projector = {path for path in TEMPLATE.variables if path.startswith("projector.")}
    assert len(adapters) == 14  # A and B of seven layers
    assert len(projector) == 4
    assert rates == dict.fromkeys(adapters, 2e-4) | dict.fromkeys(projector, 2e-5)


def test_patterns_that_fit_nothing_or_collide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pattern 'tower\.\*' fits no weight"):
        trained_paths(TEMPLATE.variables, (("tower.*", 1e-3),))
    with pytest.raises(ValueError, match=r"fits both 'projector\.\*' and '\*\.bias'"):
        trained_paths(TEMPLATE.variables, (("projector.*", 1e-3), ("*.bias", 1e-3)))


def test_random_weights_are_those_of_the_module() -> None:
    mesh = make_mesh()
    shapes, shardings = TEMPLATE.shapes(), TEMPLATE.shardings(mesh)
    with nnx.use_eager_sharding(False):
        module = TEMPLATE.make(3)
    path = "decoder.layers.mlp.up_proj.lora_a"
    (drawn,) = TEMPLATE.random(3, {path: shapes[path]}, shardings).values()
    expected = module.decoder.layers.mlp.up_proj.lora_a[...]
    np.testing.assert_allclose(drawn, expected, rtol=1e-6)
    assert float(jnp.std(drawn)) > 0.01
    half = {path: jax.ShapeDtypeStruct(drawn.shape, jnp.bfloat16)}
    (rounded,) = TEMPLATE.random(3, half, shardings).values()
    np.testing.assert_array_equal(rounded, drawn.astype(jnp.bfloat16))


def test_merge_puts_every_weight_in_its_place() -> None:
    weights = {
        path: np.full(shape.shape, index, shape.dtype)
        for index, (path, shape) in enumerate(sorted(TEMPLATE.shapes().items()))
    }
    merged = nnx.to_flat_state(nnx.state(TEMPLATE.merge(weights)))
    assert {".".join(path): variable[...].flat[0] for path, variable in merged} == {
        path: value.flat[0] for path, value in weights.items()
    }
    with pytest.raises(KeyError, match="projector.linear_0.bias"):
        TEMPLATE.merge({p: w for p, w in weights.items() if p != "projector.linear_0.bias"})
