"""A coverage threshold that keeps a given number of tokens per image on average.

Axes: I images, N patches.
"""

from typing import NamedTuple

import numpy as np

DIGITS = 6
"""Decimals of a threshold, as it is written in a spelling."""


class Calibration(NamedTuple):
    """A threshold and what it keeps of the images that it was fitted on.

    Attributes:
      threshold: the coverage to reach.
      counts: int [I], tokens of every image.
    """

    threshold: float
    counts: np.ndarray


def counts_at(
    coverage: np.ndarray, threshold: float, *, least: int = 1, most: int | None = None
) -> np.ndarray:
    """Number of tokens with which every image reaches a threshold.

    Args:
      coverage: float32 [I, N], mean similarity to the nearest kept patch after every choice.
      threshold: the coverage to reach; all N patches where it is never reached.
      least, most: bounds on the count.

    Returns:
      int [I].
    """
    reached = coverage >= np.float32(threshold)
    first = np.where(reached.any(1), reached.argmax(1) + 1, coverage.shape[1])
    return np.clip(first, least, coverage.shape[1] if most is None else most)


def fit_threshold(
    coverage: np.ndarray, tokens: float, *, least: int = 1, most: int | None = None
) -> Calibration:
    """The largest threshold whose mean count is at most `tokens`.

    Args:
      coverage, least, most: as in `counts_at`.
      tokens: mean tokens per image.

    Raises:
      ValueError: no threshold keeps so few.
    """
    low, high = 0, 10**DIGITS  # thresholds in units of the last decimal

    def counts(step: int) -> np.ndarray:
        return counts_at(coverage, step / 10**DIGITS, least=least, most=most)

    if counts(low).mean() > tokens:
        raise ValueError(
            f"a mean of {tokens:g} tokens cannot be met: every image keeps at least "
            f"{counts(low).min()}"
        )
    while low < high:
        middle = (low + high + 1) // 2
        if counts(middle).mean() <= tokens:
            low = middle
        else:
            high = middle - 1
    return Calibration(low / 10**DIGITS, counts(low))
