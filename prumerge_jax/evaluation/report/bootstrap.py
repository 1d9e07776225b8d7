"""How sure is a difference between two runs over the same questions?"""

from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A difference of means and its percentile confidence interval, in the unit of the scores."""

    difference: float
    low: float
    high: float


def paired_bootstrap(
    scores: np.ndarray,
    baseline: np.ndarray,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Bootstrap confidence interval of mean(scores) - mean(baseline), questions resampled in pairs.

    Args:
      scores: [questions] float, one value per question.
      baseline: [questions] float, the other run's value for the same questions in the same order.
      confidence: Probability mass inside the interval.
      resamples: Number of bootstrap resamples.
      seed: Same seed and arrays, same interval.

    Raises:
      ValueError: The arrays are not one-dimensional and of one length, are empty, or hold NaN.
    """
    scores, baseline = np.asarray(scores, np.float64), np.asarray(baseline, np.float64)
    if scores.ndim != 1 or scores.shape != baseline.shape or not scores.size:
        raise ValueError(
            f"paired scores of shapes {scores.shape} and {baseline.shape}: both must be [questions]"
        )
    differences = scores - baseline
    if not np.isfinite(differences).all():
        raise ValueError("scores hold NaN or infinity; leave out unscored questions in both arrays")
    # A resample of n questions matters only through how often each distinct difference is drawn,
    # and those counts are multinomial. There are few distinct differences (three for right or
    # wrong answers), so this is the same distribution without resamples x questions indices.
    values, counts = np.unique(differences, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(
        differences.size, counts / differences.size, size=resamples
    )
    means = drawn @ values / differences.size
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(differences.mean()), float(low), float(high))
