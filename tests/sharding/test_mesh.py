"""What is placed where on a mesh."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from prumerge_jax import reductions, sharding
from prumerge_jax.aot.hlo import program_cost
from prumerge_jax.engine import programs
from prumerge_jax.models.config import published
from prumerge_jax.models.layers import AdapterConfig, Linear
from prumerge_jax.models.llava import abstract_model
from tests.conftest import require_eight_devices
from tests.tiny_llava import random_llava


@dataclasses.dataclass(frozen=True)
class Gpu:
    """As much of a device as its place in a mesh depends on."""

    id: int
    slice_index: int
    platform: str = "gpu"
    device_kind: str = "NVIDIA H100 80GB HBM3"


def gpus(*nodes: int) -> list[Any]:
    """Devices of nodes with this many each."""
    node_of = [node for node, count in enumerate(nodes) for _ in range(count)]
    return [Gpu(i, node) for i, node in enumerate(node_of)]


@pytest.mark.parametrize(
    ("sizes", "nodes_of_a_data_shard"),
    [((4, 8, 1), 1), ((8, 1, 4), 1), ((2, 8, 2), 2), ((1, 32, 1), 4), ((1, 4, 8), 4)],
)
def test_nodes_lie_along_data_then_fsdp_and_never_along_tensor(
    sizes: tuple[int, int, int], nodes_of_a_data_shard: int
) -> None:
    devices = gpus(8, 8, 8, 8)
    got = sharding.arrange(devices, sizes)
    assert got.shape == sizes
    assert {device.id for device in got.flat} == {device.id for device in devices}
    node_of = np.vectorize(lambda device: device.slice_index)(got)
    assert (node_of == node_of[..., :1]).all()
    assert {len(set(shard.flat)) for shard in node_of} == {nodes_of_a_data_shard}


@pytest.mark.parametrize(
    ("nodes", "sizes"), [((8, 8), (1, 1, 16)), ((8, 8, 8), (1, 8, 3)), ((8, 4), (12, 1, 1))]
)
def test_nodes_that_a_mesh_cannot_be_laid_over_are_named(
    nodes: tuple[int, ...], sizes: tuple[int, int, int]
) -> None:
    with pytest.raises(ValueError, match=re.escape(str(sorted(nodes)))):
        sharding.arrange(gpus(*nodes), sizes)


@pytest.mark.parametrize(
    ("images", "axes"),
    [(8, ("data", "fsdp", "tensor")), (4, ("data", "fsdp")), (2, ("data",)), (3, None)],
)
def test_even_spec_takes_as_many_mesh_axes_as_divide(
    images: int, axes: tuple[str, ...] | None
) -> None:
    require_eight_devices()
    with sharding.use_mesh(sharding.make_mesh(2, 2, 2)):
        got = sharding.divisible_spec((images, 577), "images", None)
    assert got == PartitionSpec(axes, None)


@pytest.mark.parametrize("batch", [8, 6])  # 6 images lie over `data` alone
def test_images_lie_over_devices_and_need_no_collective(batch: int) -> None:
    require_eight_devices()
    config = published("tiny")
    graphdef, state = nnx.split(random_llava(config))
    side = config.vision.image_size
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, size=(batch, side, side, 3), dtype=np.uint8)
    options = {
        "reduction": reductions.parse("prumerge"),
        "dtype": jnp.dtype(jnp.float32),
    }
    expected = programs.encode(graphdef, state, pixels, **options)
    mesh = sharding.make_mesh(2, 1, 4)
    placed = jax.device_put(state, sharding.weight_shardings(abstract_model(config)[1], mesh))
    on_data = jax.device_put(pixels, NamedSharding(mesh, sharding.logical_spec("batch")))
    with sharding.use_mesh(mesh):
        compiled = programs.encode.lower(graphdef, placed, on_data, **options).compile()
    assert not program_cost(compiled.as_text()).collectives
    got = compiled(placed, on_data)
    np.testing.assert_array_equal(got.patch_indices, expected.patch_indices)
    np.testing.assert_allclose(got.tokens, expected.tokens, atol=1e-5)


@pytest.mark.parametrize("axes", [("embed", "heads"), ("mlp", "embed")])
def test_a_product_gathers_its_weights_and_leaves_its_rows(axes: tuple[str, str]) -> None:
    require_eight_devices()
    with nnx.use_eager_sharding(False):
        linear = Linear(64, 32, axes, adapter=AdapterConfig(rank=8), rngs=nnx.Rngs(0))
    linear.lora_b[...] = jax.random.normal(jax.random.key(1), linear.lora_b.shape)
    x = jax.random.normal(jax.random.key(2), (8, 64))
    graphdef, state = nnx.split(linear)
    mesh = sharding.make_mesh(1, 8, 1)
    placed = jax.device_put(state, sharding.weight_shardings(state, mesh))
    rows = jax.device_put(x, NamedSharding(mesh, sharding.logical_spec("batch")))
    with sharding.use_mesh(mesh):
        apply = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
        compiled = apply.lower(placed, rows).compile()
    assert set(program_cost(compiled.as_text()).collectives) == {"all-gather"}
    np.testing.assert_allclose(compiled(placed, rows), linear(x), rtol=1e-5, atol=1e-5)
