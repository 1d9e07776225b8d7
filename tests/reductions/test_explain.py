"""What becomes of every patch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prumerge_jax import prumerge, reductions
from prumerge_jax.reductions.prumerge import merge_targets
from tests.prumerge_oracle import random_batch

reduce = jax.jit(reductions.reduce, static_argnames="reduction")
explain = jax.jit(reductions.explain, static_argnames="reduction")


def test_merge_targets_partition_the_image() -> None:
    _, keys, attention = random_batch(3, 64, 8, seed=11)
    config = prumerge.preset("prumerge", neighbours=12)
    select = jax.jit(prumerge.select, static_argnums=1)
    selection = select(jnp.asarray(attention), config)
    targets = np.asarray(jax.jit(merge_targets, static_argnums=2)(keys, selection, config))
    for image in range(3):
        kept = np.asarray(selection.patch_indices[image, : int(selection.kept[image])])
        np.testing.assert_array_equal(targets[image, kept], np.arange(len(kept)))
        unit = keys[image] / np.linalg.norm(keys[image], axis=-1, keepdims=True)
        similarity = unit[kept] @ unit.T
        for patch in set(range(64)) - set(kept.tolist()):
            takers = []
            for slot, token in enumerate(kept):
                others = np.delete(np.argsort(-similarity[slot], kind="stable"), 0)
                assert token not in others
                if patch in others[:12]:
                    takers.append((similarity[slot, patch], slot))
            assert targets[image, patch] == (max(takers)[1] if takers else -1)


@pytest.mark.slow
def test_what_is_explained_is_what_is_reduced() -> None:
    evidence = reductions.Evidence(*random_batch(3, 36, 8, seed=2))
    for spelling in ("prumerge:neighbours=4", "prumerge+", "random"):
        reduction = reductions.parse(spelling)
        visual = reduce(evidence, reduction)
        shown = explain(evidence, reduction)
        np.testing.assert_array_equal(shown.patch_indices, visual.patch_indices)
        for image in range(3):
            patches = np.asarray(shown.patch_indices[image])
            slots = np.flatnonzero(patches >= 0)
            targets = np.asarray(shown.targets[image])
            np.testing.assert_array_equal(targets[patches[slots]], slots)
            if reduction.raster_order or spelling == "random":
                assert (targets >= 0).sum() == len(slots), "nothing is merged"


def test_a_patch_kept_twice_belongs_to_its_first_slot() -> None:
    """`prumerge+fixed` doubles patches; a baseline never does."""
    evidence = reductions.Evidence(*random_batch(2, 64, 8, seed=4))
    shown = explain(evidence, reductions.parse("prumerge+fixed:merge=none"))
    for image in range(2):
        patches = np.asarray(shown.patch_indices[image])
        kept = patches[patches >= 0].tolist()
        assert len(set(kept)) < len(kept)
        for patch in set(kept):
            assert int(shown.targets[image, patch]) == kept.index(patch)


def test_evidence_that_is_not_finite_is_flagged() -> None:
    hidden, keys, attention = random_batch(3, 36, 8)
    attention[1, 3] = np.nan
    evidence = reductions.Evidence(hidden, keys, attention)
    for spelling in ("prumerge:neighbours=4", "random", "full"):
        shown = explain(evidence, reductions.parse(spelling))
        assert int(shown.required[0]) > 0 > int(shown.required[1])
