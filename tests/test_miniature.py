"""The shipped miniature: it unpacks, answers, and reads more by PruMerge than by chance."""

import collections
import pathlib

import numpy as np
import pytest

from prumerge_jax import Llava
from prumerge_jax.conversion import miniature
from prumerge_jax.digits import questions as digits_questions
from prumerge_jax.digits.benchmark import Digits
from prumerge_jax.prumerge import PruMergeConfig, preset
from prumerge_jax.store.manifest import read_manifest
from prumerge_jax.store.model_directory import read_array, verify

SCENES = 100


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return miniature.model_directory("miniature", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def model(directory: pathlib.Path) -> Llava:
    return Llava.load(directory)


def accuracy(
    model: Llava, families: tuple[str, ...], reduction: str | PruMergeConfig
) -> dict[str, float]:
    """Share of right answers by family, on validation scenes."""
    drawn = [
        digits_questions.draw_with_questions("validation", index, seed=0) for index in range(SCENES)
    ]
    asked = [
        (scene.image, question)
        for scene, questions in drawn
        for question in questions
        if question.family in families
    ]
    answers = model.generate(
        [image for image, _ in asked],
        [question.text for _, question in asked],
        reduction=reduction,
        position_ids="original",
        max_new_tokens=Digits.max_new_tokens,
    )
    right = collections.defaultdict(list)
    for (_, question), answer in zip(asked, answers, strict=True):
        right[question.family].append(digits_questions.conclusion(answer) == question.answer)
    return {family: float(np.mean(rights)) for family, rights in right.items()}


def test_it_is_unpacked_once_and_is_intact(directory: pathlib.Path) -> None:
    verify(directory)
    before = (directory / "manifest.json").stat()
    assert miniature.model_directory("miniature", directory.parent) == directory
    assert (directory / "manifest.json").stat() == before
    assert miniature.model_directory(directory) == directory


def test_the_adapter_for_any_budget_is_merged_and_changes_the_decoder_alone(
    directory: pathlib.Path,
) -> None:
    adapted = miniature.model_directory("miniature-any-budget", directory.parent)
    verify(adapted)
    paths = sorted(read_manifest(directory).arrays)
    assert paths == sorted(read_manifest(adapted).arrays)
    changed = [
        path for path in paths if (read_array(directory, path) != read_array(adapted, path)).any()
    ]
    assert len(changed) == 7
    assert all(path.startswith("decoder.layers.") for path in changed)


@pytest.mark.slow
def test_it_answers_and_prumerge_reads_more_than_random_patches(model: Llava) -> None:
    full = accuracy(model, digits_questions.FAMILIES, "full")
    assert min(full["read"], full["presence"], full["count"]) > 0.85
    assert full["compare"] > 0.75
    plus, fewest, random = (
        accuracy(model, ("read",), reduction)["read"]
        for reduction in (
            preset("prumerge+", neighbours=8),
            preset("prumerge", neighbours=8),
            "random",
        )
    )
    assert full["read"] > plus > 0.7
    assert plus > fewest > random + 0.05
