"""The mean of the visual tokens that a plan assumes."""

import pytest

from prumerge_jax.aot.assumptions import mean_visual_tokens
from prumerge_jax.models.config import published

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
        mean_visual_tokens("tome", tiny)
