"""Reductions of evidence: the paper's function to the bit, one compilation for equal ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prumerge_jax import prumerge, reductions
from tests.prumerge_oracle import random_batch

reduce = jax.jit(reductions.reduce, static_argnames="reduction")
reduce_tokens = jax.jit(prumerge.reduce_tokens, static_argnames="config")


def test_presets_are_the_papers_parameters() -> None:
    for name in prumerge.PRESETS:
        assert reductions.parse(name) == reductions.as_reduction(prumerge.preset(name))


@pytest.mark.parametrize(("name", "dtypes"), [("prumerge+fixed", ["float32"]),
                                              ("paper+", ["float32", "bfloat16"])])  # fmt: skip
def test_the_bits_of_the_paper(name: str, dtypes: list[str]) -> None:
    hidden, keys, attention = random_batch(4, 64, 12, seed=1)
    attention[2, 5] = np.nan
    for dtype in dtypes:
        features = jnp.asarray(hidden, dtype)
        expected = reduce_tokens(features, keys, attention, config=prumerge.preset(name))
        evidence = reductions.Evidence(features, keys, attention)
        got = reduce(evidence, reductions.parse(name))
        for ours, theirs in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


def test_downsampled_images_keep_every_patch() -> None:
    hidden, keys, attention = random_batch(2, 9, 4)
    got = reduce(reductions.Evidence(hidden, keys, attention), reductions.parse("downsample:3"))
    np.testing.assert_array_equal(got.tokens, hidden)
    np.testing.assert_array_equal(got.lengths, 9)


def test_equal_reductions_compile_once() -> None:
    traced = []

    @jax.jit(static_argnames="reduction")
    def counted(evidence: reductions.Evidence, reduction: reductions.Reduction) -> jax.Array:
        traced.append(reduction)
        return reductions.reduce(evidence, reduction).lengths

    evidence = reductions.Evidence(*random_batch(2, 16, 4))
    for spelling in ("prumerge", "prumerge:neighbours=32", "prumerge:merge=sum,capacity=None"):
        counted(evidence, reductions.parse(spelling))
    counted(evidence, reductions.as_reduction(prumerge.preset("prumerge")))
    assert len(traced) == 1
    counted(evidence, reductions.parse("random"))
    counted(evidence, reductions.parse("prumerge:ranking=random,seed=0"))
    assert len(traced) == 2
    counted(evidence, reductions.parse("prumerge:neighbours=3"))
    assert len(traced) == 3
    assert len({*traced, reductions.parse("prumerge")}) == 3


def test_evidence_is_a_pytree_without_what_is_none() -> None:
    hidden, keys, attention = (jnp.asarray(x) for x in random_batch(2, 9, 4))
    evidence = reductions.Evidence(hidden, keys, attention)
    assert len(jax.tree.leaves(evidence)) == 3
    question = (jnp.ones((2, 5, 8)), jnp.ones((2, 5), bool))
    more = dataclasses.replace(evidence, cls=hidden[:, 0], question=question)
    assert len(jax.tree.leaves(more)) == 6
    doubled = jax.jit(lambda e: jax.tree.map(lambda x: x + x, e))(more)
    np.testing.assert_array_equal(doubled.cls, 2 * hidden[:, 0])
    assert doubled.projected is None
    with pytest.raises(TypeError):
        reductions.Evidence(hidden, keys, attention, hidden[:, 0])  # type: ignore[misc]


@dataclasses.dataclass(frozen=True)
class LongestRows(reductions.Reduction):
    """Two patches of an image, those of the longest projection."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"projected"})

    def capacity_for(self, num_patches: int) -> int:
        return 2

    def reduce(self, evidence: reductions.Evidence) -> prumerge.VisualTokens:
        _, patches = jax.lax.top_k(jnp.linalg.norm(evidence.projected, axis=-1), 2)
        kept = jnp.full(len(patches), 2, jnp.int32)
        return reductions.kept_rows(evidence.hidden, patches.astype(jnp.int32), kept)


def test_a_method_of_its_own_and_the_evidence_it_needs() -> None:
    hidden, keys, attention = random_batch(2, 9, 4)
    evidence = reductions.Evidence(hidden, keys, attention)
    with pytest.raises(ValueError, match=r"LongestRows.* needs evidence .*: projected"):
        reduce(evidence, LongestRows())
    projected = hidden * np.where(np.isin(np.arange(9), [6, 2]), 100, 1)[:, None]
    got = reduce(dataclasses.replace(evidence, projected=projected), LongestRows())
    for image in range(2):
        assert set(np.asarray(got.patch_indices[image]).tolist()) == {2, 6}
        np.testing.assert_array_equal(got.tokens[image], hidden[image, got.patch_indices[image]])


def test_what_is_known_before_any_image() -> None:
    for spelling, varying, selects, most in (
        ("prumerge", True, True, 16 + 1),
        ("prumerge:capacity=5", True, True, 5),
        ("prumerge-fixed", False, True, 8 + 1),
        ("full", False, False, 64),
        ("downsample:8", False, False, 64),
        ("random:capacity=5", True, True, 5),
    ):
        reduction = reductions.parse(spelling)
        assert (reduction.varying, reduction.selects_patches) == (varying, selects)
        assert reduction.capacity_for(64) == most
        assert reduction.needs == frozenset()
    assert reductions.parse("prumerge:capacity=5").uncapped() == reductions.parse("prumerge")
    assert reductions.parse("random:capacity=5").uncapped() == reductions.parse("random")
    full = reductions.parse("full")
    assert full.uncapped() == full
