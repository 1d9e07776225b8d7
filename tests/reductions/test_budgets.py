"""Budgets: thresholds for a mean count, and counts in spellings."""

import numpy as np
import pytest

from prumerge_jax import reductions
from prumerge_jax.reductions.budgets import counts_at, fit_threshold


def test_the_largest_threshold_that_keeps_to_the_budget() -> None:
    rng = np.random.default_rng(0)
    curves = np.sort(rng.random((40, 30)), axis=1).astype(np.float32)
    fitted = fit_threshold(curves, 12.5)
    assert fitted.counts.mean() <= 12.5
    assert counts_at(curves, fitted.threshold + 1e-6).mean() > 12.5
    np.testing.assert_array_equal(fitted.counts, counts_at(curves, fitted.threshold))
    for curve, count in zip(curves, fitted.counts, strict=True):
        assert curve[count - 1] >= fitted.threshold
        assert count == 1 or curve[count - 2] < fitted.threshold
    bounded = fit_threshold(curves, 12.5, least=10, most=14)
    assert bounded.counts.min() >= 10
    assert bounded.counts.max() <= 14
    assert bounded.threshold != fitted.threshold
    assert (counts_at(curves, 1.0) == 30).all()
    with pytest.raises(ValueError, match="a mean of 5 tokens cannot be met: .* at least 10"):
        fit_threshold(curves, 5, least=10)


def test_what_is_fitted_is_what_is_kept() -> None:
    """The threshold as it is spelled gives the counts that were promised."""
    hidden = np.random.default_rng(1).normal(size=(6, 25, 8)).astype(np.float32)
    evidence = reductions.Evidence(hidden, hidden, np.ones((6, 25), np.float32) / 30)
    rule = reductions.parse("cover")
    covered = np.asarray(rule.order(evidence, np.ones((6, 25), bool), 25).coverage)
    fitted = fit_threshold(covered, 9)
    visual = reductions.reduce(
        evidence, f"cover:adaptive=coverage,threshold={fitted.threshold:.6f}"
    )
    np.testing.assert_array_equal(visual.lengths, fitted.counts)


def test_fixed_counts_are_expanded() -> None:
    for spelling, expected in (
        ("cover", ["cover:tokens=64", "cover:tokens=32"]),
        ("dpp:ranking=random", ["dpp:ranking=random,tokens=64", "dpp:ranking=random,tokens=32"]),
        ("holov:crops=4", ["holov:crops=4,tokens=64", "holov:crops=4,tokens=32"]),
        ("cover:tokens=9", ["cover:tokens=9"]),
        ("cover:adaptive=coverage", ["cover:adaptive=coverage"]),
        ("prumerge", ["prumerge"]),
        ("full", ["full"]),
    ):
        assert reductions.with_budgets(spelling, [64, 32]) == expected
    with pytest.raises(ValueError, match="tokens is '?0"):
        reductions.with_budgets("cover", [0])
