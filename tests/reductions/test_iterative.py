"""PruMerge applied again to its own output."""

import jax
import numpy as np
import pytest

from prumerge_jax import prumerge, reductions
from tests.prumerge_oracle import random_batch

reduce = jax.jit(reductions.reduce, static_argnames="reduction")
reduce_tokens = jax.jit(prumerge.reduce_tokens, static_argnames="config")


@pytest.mark.slow
def test_rounds_follow_each_other_until_the_budget_is_met() -> None:
    hidden, keys, attention = random_batch(3, 36, 8, seed=3)
    reduction = reductions.parse("prumerge-iterative:tokens=7,neighbours=3")
    assert reduction.counts(36) == [18, 9, 7]
    patches = np.tile(np.arange(36), (3, 1))
    tokens = hidden
    for count in (18, 9, 7):
        config = prumerge.preset(
            "prumerge-fixed", count_rule="iqr", min_tokens=count, max_tokens=count, neighbours=3,
            pool="pruned", merge="mean", extra_token=False, order="raster",
        )  # fmt: skip
        rest = (
            np.take_along_axis(x, patches[..., None], axis=1) for x in (keys, attention[..., None])
        )
        keys_left, attention_left = rest
        visual = reduce_tokens(tokens, keys_left, attention_left[..., 0], config=config)
        kept = np.asarray(visual.patch_indices)
        tokens, patches = visual.tokens, np.take_along_axis(patches, kept, axis=1)
    got = reduce(reductions.Evidence(hidden, keys, attention), reduction=reduction)
    np.testing.assert_array_equal(got.patch_indices, patches)
    np.testing.assert_allclose(got.tokens, tokens, atol=1e-6)
    np.testing.assert_array_equal(got.lengths, 7)
    most = np.sort(np.argsort(-attention, axis=1, kind="stable")[:, :7], axis=1)
    np.testing.assert_array_equal(patches, most)


def test_a_budget_that_no_image_exceeds_changes_nothing() -> None:
    hidden, keys, attention = random_batch(2, 9, 4)
    got = reductions.reduce(reductions.Evidence(hidden, keys, attention), "prumerge-iterative")
    np.testing.assert_array_equal(got.tokens, hidden)
