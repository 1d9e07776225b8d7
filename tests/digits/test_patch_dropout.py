"""Patch dropout: which tokens stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prumerge_jax.digits.patch_dropout import PatchDropout, drop_patches
from prumerge_jax.prumerge import VisualTokens

B, R, D = 400, 24, 3
LENGTHS = np.arange(B) % R + 1  # every length, the capacity too


@pytest.fixture(scope="module")
def pixels() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, (B, 8, 8, 3), np.uint8))


@pytest.fixture(scope="module")
def visual() -> VisualTokens:
    """Tokens that say which patch they are; padding as the reduction leaves it."""
    valid = np.arange(R) < LENGTHS[:, None]
    patches = np.where(valid, np.arange(R) * 3, -1)
    tokens = np.where(valid[..., None], np.arange(1, R + 1)[:, None] * np.ones(D), 0)
    lengths = jnp.asarray(LENGTHS, jnp.int32)
    return VisualTokens(
        jnp.asarray(tokens, jnp.float32), lengths, jnp.asarray(patches, jnp.int32), lengths
    )


def test_what_stays_is_a_part_in_order(visual, pixels) -> None:
    dropped = drop_patches(visual, pixels, PatchDropout(pictures=0.5, least=0.25))
    visual, dropped = jax.tree.map(np.asarray, (visual, dropped))
    for b, length in enumerate(dropped.lengths):
        assert max(1, round(0.25 * LENGTHS[b])) - 1 <= length <= LENGTHS[b]
        assert length >= 1
        patches = dropped.patch_indices[b]
        assert (np.diff(patches[:length]) > 0).all()
        assert set(patches[:length]) <= set(visual.patch_indices[b, : LENGTHS[b]])
        np.testing.assert_array_equal(dropped.tokens[b, :length, 0], patches[:length] // 3 + 1)
        assert (patches[length:] == -1).all()
        assert not dropped.tokens[b, length:].any()


def test_shares_are_those_asked_for(visual, pixels) -> None:
    full = visual._replace(
        tokens=jnp.ones((B, R, D)),
        lengths=jnp.full(B, R),
        patch_indices=jnp.broadcast_to(jnp.arange(R), (B, R)),
    )
    lengths = np.asarray(drop_patches(full, pixels, PatchDropout(0.5, 0.25)).lengths)
    # 400 coins; a picture that loses keeps all the same where it draws nearly 1.
    assert (lengths < R).mean() == pytest.approx(0.5 * (1 - 0.5 / R / 0.75), abs=0.08)
    assert lengths[lengths < R].mean() / R == pytest.approx(0.625, abs=0.05)
    patches = np.asarray(drop_patches(full, pixels, PatchDropout(1.0, 0.5)).patch_indices)
    kept = np.bincount(patches[patches >= 0], minlength=R) / B
    np.testing.assert_allclose(kept, 0.75, atol=0.1)  # no patch is preferred


def test_nobody_loses_where_none_shall(visual, pixels) -> None:
    same = drop_patches(visual, pixels, PatchDropout(pictures=0.0, least=0.1))
    jax.tree.map(np.testing.assert_array_equal, same, visual)


def test_a_picture_is_on_its_own(visual, pixels) -> None:
    dropout = PatchDropout(0.7, 0.1)
    together = drop_patches(visual, pixels, dropout)
    order = np.random.default_rng(1).permutation(B)[:7]
    alone = drop_patches(jax.tree.map(lambda x: x[order], visual), pixels[order], dropout)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[order]), alone, together)


def test_an_image_without_tokens_stays_without(visual, pixels) -> None:
    none = visual._replace(lengths=jnp.zeros(B, jnp.int32), tokens=jnp.zeros((B, R, D)))
    dropped = drop_patches(none, pixels, PatchDropout(1.0, 0.5))
    assert not dropped.lengths.any()
    assert (dropped.patch_indices == -1).all()


@pytest.mark.parametrize("wrong", [{"pictures": 1.5, "least": 0.1}, {"pictures": 0.5, "least": -1}])
def test_shares_beyond_all_or_nothing_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match=r"patch_dropout\.\w+ is .*; expected 0 to 1"):
        PatchDropout(**wrong)
