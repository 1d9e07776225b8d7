import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prumerge_jax.evaluation.report.bootstrap import paired_bootstrap

RIGHT_OR_WRONG = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@given(RIGHT_OR_WRONG, st.integers(0, 5))
def test_order_of_questions_does_not_matter_and_the_interval_brackets(pairs, seed) -> None:
    scores, baseline = np.array(pairs, np.float64).T
    interval = paired_bootstrap(scores, baseline, resamples=200, seed=seed)
    assert interval.difference == pytest.approx(scores.mean() - baseline.mean())
    assert -1 <= interval.low <= interval.high <= 1
    order = np.random.default_rng(seed).permutation(len(pairs))
    again = paired_bootstrap(scores[order], baseline[order], resamples=200, seed=seed)
    assert again == pytest.approx(interval)


def test_equal_runs_differ_by_nothing() -> None:
    scores = np.array([0.0, 1.0, 0.3, 0.6])
    assert paired_bootstrap(scores, scores) == (0.0, 0.0, 0.0)


def test_agrees_with_the_normal_approximation() -> None:
    rng = np.random.default_rng(3)
    scores, baseline = rng.random(2000) < 0.75, rng.random(2000) < 0.70
    differences = scores.astype(float) - baseline
    half = 1.96 * differences.std() / np.sqrt(2000)
    interval = paired_bootstrap(scores, baseline)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.03)
    assert (interval.low + interval.high) / 2 == pytest.approx(interval.difference, abs=half / 20)
    wider = paired_bootstrap(scores, baseline, confidence=0.99)
    assert (wider.high - wider.low) / (2 * half) == pytest.approx(2.576 / 1.96, rel=0.05)


def test_agrees_with_resampling_indices() -> None:
    rng = np.random.default_rng(0)
    scores, baseline = rng.random(40), rng.random(40)
    chosen = rng.integers(40, size=(20_000, 40))
    means = (scores - baseline)[chosen].mean(axis=1)
    interval = paired_bootstrap(scores, baseline, resamples=20_000)
    spread = means.std()
    assert interval.low == pytest.approx(np.quantile(means, 0.025), abs=spread / 15)
    assert interval.high == pytest.approx(np.quantile(means, 0.975), abs=spread / 15)


@pytest.mark.parametrize(
    ("scores", "baseline"),
    [([1.0], [1.0, 0.0]), ([], []), ([[1.0]], [[1.0]]), ([np.nan], [1.0])],
)
def test_unpaired_or_unscored_arrays_are_refused(scores, baseline) -> None:
    with pytest.raises(ValueError, match=r"paired scores|NaN"):
        paired_bootstrap(np.array(scores), np.array(baseline))
