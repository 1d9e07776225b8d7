"""Baselines: the counts of the method, and nothing else of it."""

import jax
import numpy as np
import pytest

from prumerge_jax import reductions
from tests.prumerge_oracle import random_batch

reduce = jax.jit(reductions.reduce, static_argnames="reduction")


@pytest.mark.parametrize("base", ["prumerge", "prumerge+"])
@pytest.mark.parametrize("ranking", ["random", "uniform"])
def test_baselines_keep_as_many_tokens_as_the_method(ranking: str, base: str) -> None:
    hidden, keys, attention = random_batch(6, 144, 8, seed=5)
    evidence = reductions.Evidence(hidden, keys, attention)
    ours = reduce(evidence, reductions.parse(base))
    got = reduce(evidence, reductions.parse(f"{base}:ranking={ranking}"))
    np.testing.assert_array_equal(got.lengths, np.minimum(ours.lengths, 144))
    for image in range(6):
        kept = np.asarray(got.patch_indices[image, : int(got.lengths[image])])
        assert len(set(kept.tolist())) == len(kept)
        np.testing.assert_array_equal(got.tokens[image, : len(kept)], hidden[image, kept])
        if ranking == "uniform":
            gaps = np.diff(np.sort(kept))
            assert gaps.max() - gaps.min() <= 1
    if ranking == "random":
        other = reductions.parse(f"{base}:ranking=random,seed=1")
        again = reduce(evidence, other)
        assert (np.asarray(again.patch_indices) != np.asarray(got.patch_indices)).any()


def test_an_image_draws_the_same_patches_in_any_batch() -> None:
    hidden, keys, attention = random_batch(4, 36, 8, seed=6)
    random = reductions.parse("random:seed=7")
    together = reduce(reductions.Evidence(hidden, keys, attention), random)
    attention[1:] = np.roll(attention[1:], 5, axis=1)
    attention[2, 3] = np.nan
    among = reduce(reductions.Evidence(hidden, keys, attention), random)
    np.testing.assert_array_equal(among.patch_indices[0], together.patch_indices[0])
    np.testing.assert_array_equal(among.tokens[0], together.tokens[0])
    assert int(among.required[2]) == -1
    assert int(among.lengths[2]) == 0
    assert (np.asarray(among.patch_indices[2]) == -1).all()
    assert not np.asarray(among.tokens[2]).any()


def test_raster_order_and_capacity_are_those_of_the_method() -> None:
    evidence = reductions.Evidence(*random_batch(3, 64, 8, seed=8))
    by_rank = reduce(evidence, reductions.parse("random"))
    in_raster = reduce(evidence, reductions.parse("random:order=raster"))
    short = reduce(evidence, reductions.parse("random:capacity=4"))
    assert short.tokens.shape[1] == 4
    np.testing.assert_array_equal(short.required, by_rank.required)
    for image in range(3):
        count = int(by_rank.lengths[image])
        drawn = np.asarray(by_rank.patch_indices[image, :count])
        np.testing.assert_array_equal(in_raster.patch_indices[image, :count], np.sort(drawn))
        np.testing.assert_array_equal(short.patch_indices[image], drawn[:4])


@pytest.mark.parametrize("name", ["random", "uniform", "prumerge+:ranking=random"])
def test_default_capacity_always_suffices(name: str) -> None:
    reduction = reductions.parse(name)
    for seed, skew in ((0, 0.01), (1, 1.0), (2, 6.0)):
        evidence = reductions.Evidence(*random_batch(4, 49, 4, seed=seed, skew=skew))
        got = reduce(evidence, reduction)
        assert (np.asarray(got.required) <= reduction.capacity_for(49)).all()


def test_their_spellings() -> None:
    assert reductions.equal_count_baselines("prumerge+:neighbours=8") == [
        "prumerge+:neighbours=8,ranking=random",
        "prumerge+:neighbours=8,ranking=uniform",
    ]
    assert reductions.parse("random") == reductions.parse("prumerge:ranking=random")
    for nothing in ("full", "downsample:2", "random", "prumerge:ranking=uniform"):
        assert reductions.equal_count_baselines(nothing) == []
