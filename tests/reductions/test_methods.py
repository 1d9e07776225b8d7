"""What every registered reduction promises, whatever its method."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from prumerge_jax import reductions, sharding
from prumerge_jax.aot.hlo import program_cost
from prumerge_jax.reductions import stages
from tests.conftest import require_eight_devices

BATCH, PATCHES, WIDTH, HEADS = 8, 36, 16, 4  # on as many devices too: one compilation of each
VARIANTS = [
    "cover:tokens=7,block=3",
    "cover:adaptive=coverage,threshold=0.8",
    "cover:adaptive=attention,alpha=1",
    "divprune:tokens=9,features=hidden",
    "idselection:tokens=5,gamma=3",
    "visionzip:dominant=6,contextual=4,cls_token=False",
    "pact:cutoff=0.6",
    "prumerge:layer=22,heads=mean",
    "prumerge:layer=22",
    "prumerge:heads=mean,neighbours=5",
    "prumerge+:added_patches=lattice_fixed,neighbours=5",
    "prumerge-iterative:tokens=5,neighbours=3",
    "cover:tokens=7,merge=mean",
    "divprune:tokens=7,merge=mean,size_bias=False",
    "cover:adaptive=coverage,threshold=0.7,merge=mean",
]
SPELLINGS = [
    *(name for name in reductions.names() if name != "downsample"),
    *(pytest.param(spelling, marks=pytest.mark.slow) for spelling in VARIANTS),
]
ORDERED = ["cover", "divprune", "dpp", "evocut", "hired", "idselection", "mmtok", "top"]


def evidence_of(seed: int) -> reductions.Evidence:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=(BATCH, *shape)), jnp.float32)

    heads = jax.nn.softmax(normal(HEADS, PATCHES + 1) * 2, axis=-1)[..., 1:]
    return reductions.Evidence(
        normal(PATCHES, WIDTH),
        normal(PATCHES, WIDTH),
        jax.nn.softmax(normal(PATCHES + 1) * 2, axis=-1)[:, 1:],
        cls=normal(WIDTH),
        head_attention=heads,
        last_head_attention=heads[::-1],
        feature_attention=jax.nn.softmax(normal(PATCHES + 1) * 2, axis=-1)[:, 1:],
        feature_keys=normal(PATCHES, WIDTH),
        watched=jax.nn.sigmoid(normal(PATCHES)),
        projected=normal(PATCHES, WIDTH),
        groups=stages.every_token(BATCH, PATCHES + 1),
        question=(normal(6, WIDTH), jnp.arange(6) < jnp.asarray(rng.integers(0, 7, (BATCH, 1)))),
    )


def rows(evidence: reductions.Evidence, index) -> reductions.Evidence:
    return jax.tree.map(lambda x: x[index], evidence)


def poison(evidence: reductions.Evidence, image: int) -> reductions.Evidence:
    return jax.tree.map(
        lambda x: x.at[image].set(jnp.nan) if x.dtype == jnp.float32 else x, evidence
    )


reduce = jax.jit(reductions.reduce, static_argnames="reduction")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_batch_mates_order_and_nan_change_no_bit(spelling: str) -> None:
    """Tokens beyond the length are zero, and an image of NaN has none."""
    reduction = reductions.parse(spelling)
    evidence = evidence_of(3)
    expected = reduce(evidence, reduction)
    order, broken = np.array([3, 7, 4, 1, 2, 0, 6, 5]), 2
    visual = jax.tree.map(np.asarray, reduce(poison(rows(evidence, order), broken), reduction))
    whole = np.arange(BATCH) != broken
    for ours, theirs in zip(*map(jax.tree.leaves, (visual, expected)), strict=True):
        np.testing.assert_array_equal(ours[whole], np.asarray(theirs)[order][whole])
    assert visual.tokens.shape[1] == reduction.capacity_for(PATCHES)
    beyond = np.arange(visual.tokens.shape[1]) >= visual.lengths[:, None]
    assert not visual.tokens[beyond].any()
    assert (visual.patch_indices[beyond] == -1).all()
    assert np.isfinite(visual.tokens[whole]).all()
    if reduction.selects_patches:  # the others do not look at what could be NaN
        assert (visual.lengths[broken], visual.required[broken]) == (0, -1)


@pytest.mark.parametrize(
    "name", [ORDERED[0], *(pytest.param(name, marks=pytest.mark.slow) for name in ORDERED[1:])]
)
def test_fewer_tokens_are_among_more(name: str) -> None:
    evidence = evidence_of(5)
    kept = [
        np.asarray(reduce(evidence, reductions.parse(f"{name}:tokens={k}")).patch_indices)
        for k in (4, 20, PATCHES)
    ]
    for fewer, more in zip(kept, kept[1:], strict=False):
        for few, many in zip(fewer, more, strict=True):
            assert set(few) < set(many)
            assert (np.diff(many) > 0).all()  # raster order, each once
    assert set(kept[-1][0]) == set(range(PATCHES))


@pytest.mark.parametrize("name", ["cover:adaptive=coverage,threshold=0.7", "pact:cutoff=0.7"])
def test_a_capacity_changes_what_fits_and_says_what_was_needed(name: str) -> None:
    evidence = evidence_of(6)
    free = reduce(evidence, reductions.parse(name))
    capacity = int(free.required.min()) - 1
    capped = reduce(evidence, reductions.parse(f"{name},capacity={capacity}"))
    assert capacity > 0
    assert (capped.required > capacity).all()
    assert (capped.lengths == capacity).all()


def test_coverage_threshold_is_the_first_count_that_reaches_it() -> None:
    evidence = evidence_of(7)
    found = reduce(evidence, reductions.parse("cover:adaptive=coverage,threshold=0.6"))
    rule = reductions.parse("cover")
    everywhere = np.ones((BATCH, PATCHES), bool)
    order = jax.jit(rule.order, static_argnums=2)(evidence, everywhere, PATCHES)
    unit = np.asarray(evidence.hidden, np.float64)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    for image, count in enumerate(np.asarray(found.lengths)):
        similarity = np.maximum(unit[image] @ unit[image].T, 0)

        def reached(patches: np.ndarray, similarity: np.ndarray = similarity) -> float:
            return similarity[:, patches].max(1).mean()

        chosen = np.asarray(order.patches[image])
        np.testing.assert_array_equal(found.patch_indices[image][:count], np.sort(chosen[:count]))
        assert reached(chosen[:count]) >= 0.6 - 1e-6
        assert reached(chosen[: count - 1]) < 0.6 + 1e-6


@pytest.mark.slow
def test_padding_is_never_kept() -> None:
    evidence = evidence_of(8)
    present = jnp.asarray(np.random.default_rng(9).random((BATCH, PATCHES)) < 0.5)
    padded = dataclasses.replace(evidence, present=present)
    for name in ORDERED:
        visual = reduce(padded, reductions.parse(f"{name}:tokens={PATCHES}"))
        for image in range(BATCH):
            count = int(visual.lengths[image])
            assert count == int(present[image].sum())
            assert set(np.asarray(visual.patch_indices[image][:count])) == set(
                np.flatnonzero(present[image])
            )


def test_one_compilation_serves_every_batch_of_a_size() -> None:
    sizes = set()
    for seed in range(3):
        for spelling in ("cover", "mmtok", "visionzip", "holov", "pact"):
            reduce(evidence_of(seed), reductions.parse(spelling))
        sizes.add(reduce._cache_size())
    assert len(sizes) == 1


def test_merged_tokens_are_means_of_what_is_nearest_and_know_their_size() -> None:
    evidence = evidence_of(9)
    plain, merged, bare = (
        reduce(evidence, reductions.parse(f"cover:tokens=7{more}"))
        for more in ("", ",merge=mean", ",merge=mean,size_bias=False")
    )
    targets = jax.jit(reductions.explain, static_argnames="reduction")(
        evidence, reductions.parse("cover:tokens=7,merge=mean")
    ).targets
    assert merged.tokens.shape[-1] == WIDTH + 1
    np.testing.assert_array_equal(merged.tokens[..., :WIDTH], bare.tokens)
    np.testing.assert_array_equal(merged.patch_indices, plain.patch_indices)
    unit = np.asarray(evidence.hidden, np.float64)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)
    for image in range(BATCH):
        kept = np.asarray(plain.patch_indices[image])
        nearest = np.argmax(unit[image] @ unit[image][kept].T, axis=1)
        nearest[kept] = np.arange(7)
        np.testing.assert_array_equal(targets[image], nearest)
        for slot in range(7):
            members = np.asarray(evidence.hidden[image])[nearest == slot]
            np.testing.assert_allclose(bare.tokens[image, slot], members.mean(0), atol=1e-5)
            size = np.exp(merged.tokens[image, slot, WIDTH])
            np.testing.assert_allclose(size, len(members), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "spelling",
    ["cover", "cover:block=8", "idselection", "dpp", "mmtok", "visionzip", "holov", "pact",
     "prumerge-iterative", "cover:tokens=7,merge=mean", "cover:ranking=random"],
)  # fmt: skip
def test_a_sharded_batch_needs_no_collective(spelling: str) -> None:
    require_eight_devices()
    mesh = sharding.make_mesh(8, 1, 1)
    evidence = evidence_of(0)
    placed = jax.device_put(evidence, NamedSharding(mesh, sharding.logical_spec("batch")))
    reduction = reductions.parse(spelling)
    with sharding.use_mesh(mesh):
        compiled = reduce.lower(placed, reduction).compile()
    assert not program_cost(compiled.as_text()).collectives
    alone, together = reduce(evidence, reduction), compiled(placed)
    np.testing.assert_array_equal(alone.patch_indices, together.patch_indices)
    np.testing.assert_allclose(alone.tokens, together.tokens, atol=1e-6)
