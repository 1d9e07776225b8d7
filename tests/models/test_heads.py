"""Splitting projections into heads and joining them: the kernel against XLA's reshapes."""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prumerge_jax.models import tuning
from prumerge_jax.models.config import TextConfig, published
from prumerge_jax.models.heads import join_heads, split_heads
from prumerge_jax.models.llama import Llama
from prumerge_jax.models.rotary import Rotation, rotation
from prumerge_jax.sharding.mesh import make_mesh, use_mesh

WIDTH = 128


@pytest.fixture(scope="module")
def turned() -> Rotation:
    positions = jnp.arange(2 * 384).reshape(2, 384) % 300
    return rotation(positions, published("llava-1.5-7b").text)


def both_ways(heads: int, by: Rotation, dtype: jnp.dtype) -> Iterator[jax.Array]:
    """Heads of random projections, rotated and not, what joins them, and all gradients."""
    drawn = jax.random.normal(jax.random.key(heads), (2, 2, 384, heads * WIDTH), jnp.bfloat16)
    flat, gradient = drawn.astype(dtype)
    of_heads = gradient.reshape(2, 384, heads, WIDTH)
    for turn in (None, by):
        split, pull = jax.vjp(lambda x, turn=turn: split_heads(x, WIDTH, turn), flat)
        yield from (split, *pull(of_heads))
    joined, pull = jax.vjp(join_heads, of_heads)
    yield from (joined, *pull(flat))


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 0), (jnp.bfloat16, 2**-8)])
@pytest.mark.parametrize("heads", [1, 6, 16])
def test_the_kernel_does_what_reshapes_do(
    turned: Rotation, heads: int, dtype: jnp.dtype, tolerance: float
) -> None:
    with tuning.use(tuning.Tuning.plain()):
        exact = list(both_ways(heads, turned, jnp.float32))
    with tuning.use(dataclasses.replace(tuning.Tuning.plain(), heads="kernel")):
        found = list(both_ways(heads, turned, dtype))
    assert len(found) == 6
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == dtype
        # It rounds once.
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, tolerance, 1e-6 * tolerance)


def test_every_device_of_a_mesh_moves_its_own(turned: Rotation) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 384, 4 * WIDTH))
    expected = split_heads(x, WIDTH, turned)
    with (
        use_mesh(make_mesh(data=2, fsdp=1, tensor=4)),
        tuning.use(dataclasses.replace(tuning.Tuning.plain(), heads="kernel")),
    ):
        split = jax.jit(lambda x: split_heads(x, WIDTH, turned))
        heads = split(x)
        assert {shard.data.shape for shard in heads.addressable_shards} == {(1, 384, 1, WIDTH)}
        np.testing.assert_array_equal(heads, expected)
        np.testing.assert_array_equal(jax.jit(join_heads)(heads), join_heads(expected))
        assert not [
            name
            for name in ("all-gather", "all-to-all", "collective-permute")
            if name in split.lower(heads.reshape(x.shape)).compile().as_text()
        ]


@pytest.mark.parametrize("shape", [(2, 100, 4, WIDTH), (2, 384, 4, 64)])
def test_what_the_kernel_does_not_take_is_reshaped(shape: tuple[int, ...]) -> None:
    flat = jax.random.normal(jax.random.key(1), (*shape[:2], shape[2] * shape[3]))
    with tuning.use(dataclasses.replace(tuning.Tuning.plain(), heads="kernel")):
        heads = split_heads(flat, shape[3])
        np.testing.assert_array_equal(heads, flat.reshape(shape))
        np.testing.assert_array_equal(join_heads(heads), flat)


def gradients(remat: str, data: int, fsdp: int, tensor: int) -> dict[str, jax.Array]:
    """Of a decoder's weights, in packed rows of 128 tokens and on a mesh."""
    config = TextConfig(
        vocab_size=64,
        width=64,
        mlp_width=96,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=128,
    )
    with nnx.use_eager_sharding(False):
        graphdef, weights = nnx.split(Llama(config, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (4, 128, 64))
    positions = jnp.tile(jnp.arange(64), (4, 2))
    segments = jnp.repeat(jnp.arange(1, 3), 64)[None].repeat(4, 0)

    def loss(weights: nnx.State) -> jax.Array:
        hidden = nnx.merge(graphdef, weights)(x, positions, segments, remat=remat)
        return (hidden[:, :100] ** 3).mean()

    with use_mesh(make_mesh(data=data, fsdp=fsdp, tensor=tensor)), nnx.use_eager_sharding(False):
        return dict(nnx.to_flat_state(jax.jit(jax.grad(loss))(weights)))


@pytest.fixture(scope="module")
def expected_gradients() -> dict[str, jax.Array]:
    return gradients("none", 1, 1, 1)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_a_decoder_has_the_gradients_that_it_has_with_reshapes(
    remat: str, expected_gradients: dict[str, jax.Array]
) -> None:
    with tuning.use(dataclasses.replace(tuning.Tuning.plain(), heads="kernel")):
        found = gradients(remat, 2, 2, 2)
    for path, gradient in expected_gradients.items():
        scale = np.abs(gradient[...]).max()
        np.testing.assert_allclose(
            found[path][...], gradient[...], rtol=1e-5, atol=1e-5 * scale, err_msg=str(path)
        )
