"""The mean of the visual tokens that a plan assumes."""

import pytest

from prumerge_jax.aot.assumptions import largest_layout, mean_visual_tokens
from prumerge_jax.engine.shapes import most_visual_tokens
from prumerge_jax.families import published
from prumerge_jax.reductions import parse

VISION = published("llava-1.5-7b").vision


@pytest.mark.parametrize(
    ("spelling", "mean", "reason"),
    [
        ("prumerge", 40, "the paper's mean for prumerge"),
        ("prumerge:neighbours=8,merge=mean", 40, "the paper's mean for prumerge"),
        ("prumerge+", 144, "the paper's mean for prumerge+"),
        ("prumerge+:ranking=random", 144, "the paper's mean for prumerge+"),
        ("random", 40, "the paper's mean for random"),
        ("prumerge+:capacity=100", 100, "its capacity"),
        ("prumerge:iqr_factor=3", 145, "the most it can need"),
        ("paper", 145, "the most it can need"),
        ("prumerge-fixed", 73, "fixed"),
        ("full", 576, "fixed"),
        ("downsample:8", 64, "fixed"),
    ],
)
def test_published_means_or_else_the_capacity(spelling: str, mean: float, reason: str) -> None:
    assert mean_visual_tokens(spelling, VISION) == (mean, reason)


def test_a_smaller_tower_keeps_the_published_share() -> None:
    tiny = published("tiny").vision
    assert mean_visual_tokens("prumerge", tiny).mean == 40 * tiny.num_patches / 576
    with pytest.raises(ValueError, match="unknown reduction"):
        mean_visual_tokens("fewest", tiny)


@pytest.mark.parametrize(
    ("model", "reduction", "crops", "tokens"),
    [
        ("llava-1.5-7b", "full", 1, 576),
        ("llava-1.5-7b", "prumerge+", 1, 577),
        ("llava-next-vicuna-7b", "full", 5, 2928),
        ("llava-next-mistral-7b", "prumerge-fixed", 5, 5 * 73 + 48),
        # A bound over all windows; the largest found by trying image sizes has 8,765.
        ("llava-onevision-7b", "full", None, 8829),
    ],
)
def test_the_largest_image(model: str, reduction: str, crops: int | None, tokens: int) -> None:
    layout = largest_layout(published(model), parse(reduction))
    assert most_visual_tokens(parse(reduction), layout) == tokens
    assert crops in (None, layout.num_crops)
