"""HiRED: tokens of an image shared out over its crops."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import lora
from prumerge_jax import reductions
from prumerge_jax.data.layout import Layout
from prumerge_jax.data.visual_layout import shared_lengths
from prumerge_jax.reductions.crops import HiredCrops, crop_shares
from prumerge_jax.training.config import ConfigError, parse
from prumerge_jax.training.objectives.next_token import run_reduction
from tests.families import NEXT_VICUNA

SIDE = 8
QUADRANT = 1 + (np.indices((SIDE, SIDE)) // (SIDE // 2) * [[[2]], [[1]]]).sum(0).reshape(-1)


def test_a_quadrant_of_content_gets_its_tiles_share() -> None:
    content = np.zeros((2, SIDE, SIDE), np.float32)
    content[0, :4, 4:] = 1  # all of it above, on the right
    content[1, ::2, ::2] = 1  # a quarter of it in every quadrant
    expected = [[30, 0, 10, 0, 0], [30, 2, 2, 2, 2]]
    for row, shares in zip(content.reshape(2, -1), expected, strict=True):
        found = crop_shares(row, QUADRANT, 5, total=40, alpha=0.75)
        np.testing.assert_array_equal(found, shares)


@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
def test_shares_stay_within_the_total_and_a_crops_capacity(alpha: float) -> None:
    rng = np.random.default_rng(0)
    for tokens, crops in itertools.product((1, 7, 30, 64, 900), (1, 2, 3, 5)):
        rule = reductions.parse(f"hired:tokens={tokens},alpha={alpha}")
        capacity = rule.for_crops(5).capacity_for(SIDE**2)
        for peak in (1, 1000):  # the content anywhere, or all of it in the first tiles
            content = rng.random(SIDE**2).astype(np.float32)
            content *= np.where(QUADRANT == 1, peak, 1)
            shares = rule.crop_shares(content, np.minimum(QUADRANT, crops - 1), crops)
            assert shares.shape == (crops,)
            assert shares.max() <= capacity <= SIDE**2
            total = min(crops * tokens, crops * SIDE**2)
            lost = crops - 1 if shares.max() < SIDE**2 and alpha < 1 else total
            assert total - lost <= shares.sum() <= total
            if crops > 1:
                assert shares[0] == min(int(crops * tokens * alpha), SIDE**2)


def evidence_of(heads: np.ndarray, first: np.ndarray, **more: np.ndarray) -> reductions.Evidence:
    batch, _, num_patches = heads.shape
    hidden = jnp.arange(batch * num_patches, dtype=jnp.float32).reshape(batch, num_patches, 1)
    return reductions.Evidence(
        hidden, hidden, heads.mean(1), head_attention=heads, first_attention=first, **more
    )


def test_a_prefix_of_a_crops_tokens_is_what_fewer_tokens_keep() -> None:
    """Whatever the room; without patches beside the image, and nothing of an image of NaN."""
    rng = np.random.default_rng(1)
    heads = rng.random((4, 2, SIDE**2)).astype(np.float32)
    heads[3, 1, 5] = np.nan
    present = rng.random((4, SIDE**2)) < 0.1
    evidence = evidence_of(heads, rng.random((4, SIDE**2)).astype(np.float32), present=present)
    reduce = jax.jit(reductions.reduce, static_argnames="reduction")
    visual = reduce(evidence, reduction=reductions.parse("hired:tokens=9").for_crops(5))
    assert visual.tokens.shape[1] == 23  # of 45 the whole image gets 22, one tile what is left
    np.testing.assert_array_equal(visual.lengths, [*np.minimum(present.sum(1), 23)[:3], 0])
    np.testing.assert_array_equal(visual.required, [*np.minimum(present.sum(1), 23)[:3], -1])
    fewer = reduce(evidence, reduction="hired:tokens=3")
    for few, many in zip(*(np.array(v.patch_indices) for v in (fewer, visual)), strict=True):
        assert set(few) - {-1} == set(many[:3]) - {-1}


def test_frames_and_images_of_one_crop_share_nothing() -> None:
    rule = reductions.parse("hired:tokens=5").for_crops(3)
    pictures = [(Layout(4, frames=2, pooled=4), [3, 1]), (Layout(4), [0])]
    kept = shared_lengths(np.array([9, 3, 9, 9]), np.ones((4, 16), np.float32), pictures, rule)
    assert kept.tolist() == [5, 3, 9, 5]


def test_what_it_does_not_take_is_refused_with_what_to_do() -> None:
    for spelling in ("hired:merge=mean", "hired:adaptive=attention"):
        rule = reductions.parse(spelling)
        assert rule.for_crops(5) == rule
        refusal = reductions.refusal_of_crops(rule)
        assert refusal is not None
        assert "expected it without 'adaptive' and 'merge'" in refusal
    config = lora.get_config()
    config.reduction = "hired:merge=mean"
    parsed = dataclasses.replace(parse(config), model=NEXT_VICUNA)
    with pytest.raises(ConfigError, match="hired:merge=mean shares a fixed number of unmerged"):
        run_reduction(parsed)
    assert isinstance(reductions.parse("hired").for_crops(5), HiredCrops)
    assert reductions.parse("hired").for_crops(1) == reductions.parse("hired:alpha=0.5")
    with pytest.raises(ValueError, match=r"alpha is '?1.1'?; expected a number from 0.0 to 1.0"):
        reductions.parse("hired:alpha=1.1")
