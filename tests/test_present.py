"""PruMerge of an image whose patches are not all present equals PruMerge of these alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prumerge_jax import prumerge

N, D = 36, 8

reduce_tokens = jax.jit(prumerge.reduce_tokens, static_argnames=("config",))


def evidence(seed: int = 0, batch: int = 3) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    hidden, keys = rng.normal(size=(2, batch, N, D)).astype(np.float32)
    attention = jax.nn.softmax(jnp.asarray(2 * rng.normal(size=(batch, N)).astype(np.float32)))
    return jnp.asarray(hidden), jnp.asarray(keys), attention


@pytest.mark.parametrize(
    "config",
    [
        prumerge.preset("prumerge+"),
        prumerge.preset("paper+", order="raster"),
        prumerge.preset("full"),
    ],
)
def test_patches_that_are_not_present_change_nothing(config: prumerge.PruMergeConfig):
    hidden, keys, attention = evidence()
    present = np.zeros((3, N), bool)
    present[0, 6:30] = True
    present[1].reshape(6, 6)[1:4, 2:5] = True
    present[2] = True
    got = reduce_tokens(hidden, keys, attention, config=config, present=jnp.asarray(present))
    for image in range(2):
        seen = np.flatnonzero(present[image])
        alone = reduce_tokens(
            *(x[image : image + 1, seen] for x in (hidden, keys, attention)), config=config
        )
        length = int(alone.lengths[0])
        assert int(got.lengths[image]) == int(got.required[image]) == length
        patches = np.asarray(alone.patch_indices)[0, :length]
        expected = np.where(patches >= 0, seen[patches], -1)
        np.testing.assert_array_equal(got.patch_indices[image, :length], expected)
        np.testing.assert_allclose(
            got.tokens[image, :length], alone.tokens[0, :length], atol=2e-6, rtol=2e-6
        )
        assert not np.asarray(got.tokens)[image, length:].any()


@pytest.mark.parametrize("name", ["prumerge+", "full"])
def test_an_image_without_a_patch_has_no_token(name: str):
    none = jnp.zeros((3, N), bool)
    got = reduce_tokens(*evidence(), config=prumerge.preset(name), present=none)
    assert not np.asarray(got.lengths).any()
    assert not np.asarray(got.required).any()
    assert not np.asarray(got.tokens).any()


@pytest.mark.parametrize("name", ["prumerge+", "prumerge+fixed", "paper+"])
def test_an_image_whose_patches_are_all_present_is_as_before(name: str):
    config, (hidden, keys, attention) = prumerge.preset(name), evidence()
    got = reduce_tokens(hidden, keys, attention, config=config, present=jnp.ones((3, N), bool))
    before = reduce_tokens(hidden, keys, attention, config=config)
    for ours, theirs in zip(got, before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_attention_that_is_not_finite_fails_wherever_it_is():
    hidden, keys, attention = evidence()
    present = jnp.ones((3, N), bool).at[0, 3].set(False)
    attention, config = attention.at[0, 3].set(jnp.nan), prumerge.preset("prumerge+")
    got = reduce_tokens(hidden, keys, attention, config=config, present=present)
    assert got.required[0] == -1
    assert got.lengths[0] == 0
