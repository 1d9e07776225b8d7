"""The shipped miniature: it unpacks, reads digits, and loses as little as the paper says."""

import collections
import pathlib

import numpy as np
import pytest

from prumerge_jax import Llava
from prumerge_jax.conversion import miniature
from prumerge_jax.data import digits_questions
from prumerge_jax.models.directory import verify

SCENES = 20


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return miniature.model_directory("miniature", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def model(directory: pathlib.Path) -> Llava:
    return Llava.load(directory)


def accuracy(model: Llava, reduction: str) -> dict[str, float]:
    """Share of right answers by family, on validation scenes."""
    drawn = [
        digits_questions.draw_with_questions("validation", index, seed=0) for index in range(SCENES)
    ]
    asked = [(scene.image, question) for scene, questions in drawn for question in questions]
    answers = model.generate(
        [image for image, _ in asked],
        [question.text for _, question in asked],
        reduction=reduction,
        position_ids="original",
        max_new_tokens=2,
    )
    right = collections.defaultdict(list)
    for (_, question), answer in zip(asked, answers, strict=True):
        right[question.family].append(answer == question.answer)
    return {family: float(np.mean(rights)) for family, rights in right.items()}


def test_it_is_unpacked_once_and_is_intact(directory: pathlib.Path) -> None:
    verify(directory)
    before = (directory / "manifest.json").stat()
    assert miniature.model_directory("miniature", directory.parent) == directory
    assert (directory / "manifest.json").stat() == before
    assert miniature.model_directory(directory) == directory


def test_it_reads_digits_and_prumerge_keeps_most_of_it(model: Llava) -> None:
    full = accuracy(model, "full")
    assert full["read"] > 0.85
    assert min(full["presence"], full["count"]) > 0.75
    plus, fewest, random = (
        accuracy(model, name)["read"] for name in ("prumerge+", "prumerge", "random")
    )
    assert full["read"] >= plus >= 0.7
    assert plus >= fewest > random
