"""Budgets over crops."""

import numpy as np
import pytest

from prumerge_jax.reductions import crops


def test_a_quadrant_of_content_gets_the_sub_images_budget() -> None:
    attention = np.zeros((2, 8, 8), np.float32)
    attention[0, :4, 4:] = 1  # all content above, on the right
    attention[1, ::2, ::2] = 1  # a quarter of every quadrant
    budgets = crops.crop_budgets(attention.reshape(2, 64), (2, 2), total=40, alpha=0.75)
    np.testing.assert_array_equal(budgets, [[30, 0, 10, 0, 0], [30, 2, 2, 2, 2]])


def test_quadrants_need_a_grid() -> None:
    with pytest.raises(ValueError, match="quadrants need a square grid; got 12 patches"):
        crops.crop_budgets(np.ones((1, 12), np.float32), (2, 2), total=4)
