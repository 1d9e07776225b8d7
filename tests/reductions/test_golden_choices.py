"""The choices against outputs of the authors' functions, and of float64 loops where none run."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prumerge_jax import reductions
from prumerge_jax.reductions import clustering, crops, evolution, greedy

reduce = jax.jit(reductions.reduce, static_argnames="reduction")
crop_shares = jax.jit(clustering.crop_shares, static_argnames=("crops", "tokens", "alpha"))
density_peaks = jax.jit(clustering.density_peaks, static_argnums=2)
TIED = 1e-12
"""Relative gap below which two gains of the float64 loops are the same number, rounded."""


class Image:
    """One image of the golden inputs, as a batch of one."""

    def __init__(self, inputs, name: str) -> None:
        size, index = name.split("_")
        row = slice(int(index), int(index) + 1)
        hidden, keys = inputs[f"hidden_{size}"][row], inputs[f"keys_{size}"][row]
        self.cls, self.hidden = hidden[:, :1], hidden[:, 1:]
        self.keys = keys[:, 1:]
        self.attention = inputs[f"cls_attention_{size}"][row][:, :, 1:].mean(1)
        # In float64, so that no BLAS decides between near-ties.
        projected = self.hidden.astype(np.float64) @ inputs["projector"].astype(np.float64)
        self.projected = projected.astype(np.float32)
        self.everywhere = np.ones(self.attention.shape, bool)
        self.name = name

    def evidence(self, **more) -> reductions.Evidence:
        return reductions.Evidence(self.hidden, self.keys, self.attention, **more)


@pytest.fixture(scope="module")
def data(golden):
    folder = golden / "reducers"
    if not folder.is_dir():
        pytest.skip("the golden data has no reducers/")
    return {file.stem: np.load(file) for file in folder.glob("*.npz")}


def cases(data, file: str, pattern: str):
    found = [(re.fullmatch(pattern, name), name) for name in data[file].files]
    chosen = [
        (Image(data["inputs"], match[1]), match.groups()[1:], data[file][name])
        for match, name in found
        if match
    ]
    assert chosen
    return chosen


def unit_range(x):
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    return (x - low) / (high - low)


def test_farthest_points_are_those_of_the_loop(data):
    for image, _, expected in cases(data, "independent", r"divprune_(\d+_\d)_order64"):
        order = greedy.farthest_points(greedy.cosines(image.projected), image.everywhere, 64)
        np.testing.assert_array_equal(order[0], expected)


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
def test_coverage_is_that_of_the_loop(data, alpha: float):
    pattern = rf"scope_(\d+_\d)_alpha{alpha}_order64"
    for image, _, expected in cases(data, "independent", pattern):
        similarity = np.maximum(greedy.cosines(image.hidden), 0)
        order, _ = greedy.coverage(similarity, image.attention**alpha, image.everywhere, 64)
        first = np.flatnonzero(np.asarray(order[0]) != expected)
        if not len(first):
            continue
        # Two patches that cover only themselves and each other gain the same: the loop's choice
        # among them is its rounding. Ours is then as good, and the lower index.
        step, u = int(first[0]), image.hidden[0].astype(np.float64)
        u /= np.linalg.norm(u, axis=1, keepdims=True)
        exact = np.maximum(u @ u.T, 0)
        best = exact[:, expected[:step]].max(1)
        weight = image.attention[0].astype(np.float64) ** alpha
        gain = weight * np.maximum(exact - best[:, None], 0).mean(0)
        ours, theirs = int(order[0][step]), int(expected[step])
        assert abs(gain[ours] / gain[theirs] - 1) < TIED
        assert ours < theirs


def test_coverage_reached_is_that_of_the_loop(data):
    for image, _, expected in cases(data, "independent", r"scope_(\d+_\d)_alpha0.0_coverage64"):
        similarity = np.maximum(greedy.cosines(image.hidden), 0)
        ones = np.ones_like(image.attention)
        _, covered = greedy.coverage(similarity, ones, image.everywhere, 64)
        np.testing.assert_allclose(covered[0], expected, atol=1e-6)


def test_soft_suppression_is_that_of_the_loop(data):
    for image, _, expected in cases(data, "independent", r"idselection_(\d+_\d)_order64"):
        score = unit_range(image.attention)
        similarity = greedy.cosines(image.hidden)
        order = greedy.soft_suppression(score, similarity, image.everywhere, 64, gamma=20.0)
        np.testing.assert_array_equal(order[0], expected)


def test_determinantal_order_is_that_of_the_loop(data):
    for image, _, expected in cases(data, "independent", r"dpp_attention_(\d+_\d)_order64"):
        quality = unit_range(image.attention)
        kernel = quality[:, :, None] * greedy.cosines(image.hidden) * quality[:, None]
        order = greedy.determinantal(kernel, image.everywhere, 64)
        np.testing.assert_array_equal(order[0], expected)


def test_top_is_fastervlm(data):
    for image, (count,), expected in cases(data, "fastervlm", r"(\d+_\d)_k(\d+)_indices"):
        chosen = greedy.top(image.attention, image.everywhere, int(count))
        np.testing.assert_array_equal(np.sort(chosen[0]), expected)


@pytest.mark.slow
def test_contextual_tokens_are_visionzips(data):
    pattern = r"(\d+_\d)_dominant(\d+)_contextual(\d+)_tokens"
    for image, sizes, expected in cases(data, "visionzip", pattern):
        dominant, contextual = map(int, sizes)
        heads = image.keys.reshape(*image.keys.shape[:2], 4, -1).mean(2)
        found = jax.jit(clustering.contextual, static_argnums=(2, 3))(
            image.attention, heads, dominant, contextual
        )
        merged = np.asarray(found.weights[0]) @ image.hidden[0]
        kept = image.hidden[0][np.asarray(found.dominant[0])]
        tokens = np.concatenate([image.cls[0], kept, merged])
        np.testing.assert_allclose(tokens, expected, atol=1e-5)


@pytest.mark.slow
def test_crop_shares_are_holovs(data):
    for image, sizes, expected in cases(data, "holov", r"(\d+_\d)_crops(\d+)_k(\d+)_tokens"):
        crops, count = map(int, sizes)
        kept = crop_shares(image.projected, image.attention, crops=crops, tokens=count, alpha=0.09)[
            0
        ]
        assert kept.sum() == count
        # Tokens, not numbers: equal patches have no order there. Zero tokens stand for a surplus
        # that is given to other crops here.
        ours = np.sort(image.projected[0][np.asarray(kept)][:, :16], axis=0)
        theirs = np.sort(expected[np.abs(expected).sum(1) > 0], axis=0)
        if len(theirs) == count:
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        else:
            gap = np.abs(image.projected[0][:, None, :16] - expected[None]).max(-1)
            found = set(np.flatnonzero(kept))
            wanted = [set(np.flatnonzero(column < 1e-5)) for column in gap.T]
            assert all(patches & found for patches in wanted if patches)


def test_density_peaks_are_pacts(data):
    for image, (cutoff,), expected in cases(data, "pact", r"(\d+_\d)_cutoff([\d.]+)_labels"):
        found = density_peaks(image.keys, image.everywhere, float(cutoff))
        np.testing.assert_array_equal(found.centre[0], expected)


@pytest.mark.slow
def test_coverage_of_texts_and_patches_is_mmtoks(data):
    pattern = r"(\d+_\d)_k(\d+)_alpha([\d.]+)_tv([\d.]+)_vv([\d.]+)_excluded(\d)_indices"
    words = data["inputs"]["llm_text"][None]
    for image, (count, alpha, text, vision, excluded), expected in cases(data, "mmtok", pattern):
        present = image.everywhere.copy()
        if excluded == "5":
            present[0, [0, 1, 2, 3, 130]] = False
        evidence = image.evidence(
            projected=image.projected,
            question=(words, np.ones(words.shape[:2], bool)),
            present=present,
        )
        temperatures = f"text_temperature={text},vision_temperature={vision}"
        spelling = f"mmtok:tokens={count},alpha={alpha},{temperatures}"
        visual = reduce(evidence, reduction=spelling)
        np.testing.assert_array_equal(visual.patch_indices[0], expected)


def test_evolution_score_and_order_are_those_of_the_loop(data):
    rotation = data["independent"]["evocut_144_0_rotation"]
    for image, _, expected in cases(data, "independent", r"evocut_(\d+_\d)_score"):
        states = [image.hidden, image.keys, image.keys @ rotation, image.hidden @ rotation]
        score = jnp.zeros(image.attention.shape)
        for before, after in zip(states, states[1:], strict=False):
            score = evolution.update_score(score, before, after)
        np.testing.assert_allclose(score[0], expected, atol=1e-6)
        order = data["independent"][f"evocut_{image.name}_order64"]
        visual = reduce(image.evidence(watched=score), reduction="evocut")
        np.testing.assert_array_equal(visual.patch_indices[0], np.sort(order))


def test_shares_and_choices_of_crops_are_hireds(data):
    """With the authors' pieces of the raster in place of quadrants."""
    hired = data["hired"]
    first, heads = hired["first_layer"][:, :, 1:].sum(1), hired["late_layer"][:, :, 1:]
    late = heads.swapaxes(1, 2)
    raster = 1 + np.arange(late.shape[1]) // (late.shape[1] // 4)
    evidence = reductions.Evidence(
        late, late, heads.mean(1), head_attention=heads, first_attention=first
    )
    visual = reduce(evidence, reduction=crops.HiredCrops(tokens=late.shape[1], most_crops=5))
    np.testing.assert_array_equal(visual.content, first)
    names = [name for name in hired.files if name.endswith("_mask")]
    assert names
    for name in names:
        rate, alpha = map(float, re.fullmatch(r"rate([\d.]+)_alpha([\d.]+)_mask", name).groups())
        shares = crops.crop_shares(
            first[0], raster, len(late), total=int(late[..., 0].size * rate), alpha=alpha
        )
        for patches, share, expected in zip(visual.patch_indices, shares, hired[name], strict=True):
            np.testing.assert_array_equal(np.sort(patches[:share]), np.flatnonzero(expected))
