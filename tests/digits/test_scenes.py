"""The scenes of the miniature benchmark, their questions, and the vocabulary made for them."""

import collections
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from prumerge_jax.digits import questions as digits_questions
from prumerge_jax.digits import scenes as digits
from prumerge_jax.digits.questions import FAMILIES

SCENES = 1_000

scenes = st.builds(
    digits.draw_scene,
    st.sampled_from(digits.SPLITS),
    st.integers(0, 10**6),
    seed=st.integers(0, 2**31),
)


@pytest.fixture(scope="module")
def questions_by_family() -> dict[str, list[digits_questions.Question]]:
    """Questions of every family about the first test scenes."""
    families = collections.defaultdict(list)
    for index in range(SCENES):
        _, questions = digits_questions.draw_with_questions("test", index, seed=0)
        for question in questions:
            families[question.family].append(question)
    return families


def test_the_splits_share_no_handwriting_and_together_hold_all_of_it() -> None:
    rows = {split: sum(digits.handwriting(split), ()) for split in digits.SPLITS}
    assert {split: len(rows[split]) for split in rows} == {
        "train": 1206,
        "validation": 198,
        "test": 393,
    }
    assert sorted(sum(rows.values(), ())) == list(range(1797))


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'dev'.*train"):
        digits.draw_scene("dev", 0, seed=0)


@settings(max_examples=50)
@given(scenes)
def test_a_scene_shows_the_named_digits_at_the_named_places(scene: digits.Scene) -> None:
    split = scene.id.split("_")[0]
    labels = load_digits().target
    assert 1 <= len(scene.places) <= digits.MAX_DIGITS
    assert list(scene.places) == sorted(set(scene.places), key=digits.PLACES.index)
    for digit, sample in zip(scene.digits, scene.samples, strict=True):
        assert labels[sample] == digit
        assert sample in digits.handwriting(split)[digit]
    # Only digits are bright: a stroke reaches 60 + 75 and the noise adds 12.
    cells = scene.image.max(axis=2).reshape(3, digits.CELL, 3, digits.CELL).swapaxes(1, 2)
    ink = (cells > 165).sum(axis=(2, 3)).ravel()
    occupied = [place in scene.places for place in digits.PLACES]
    assert np.array_equal(ink > 20, occupied), ink


def test_a_scene_depends_on_seed_split_and_index_alone() -> None:
    scene = digits.draw_scene("test", 3, seed=0)
    assert np.array_equal(scene.image, digits.draw_scene("test", 3, seed=0).image)
    others = [
        digits.draw_scene("test", 3, seed=1),
        digits.draw_scene("test", 4, seed=0),
        digits.draw_scene("validation", 3, seed=0),
    ]
    assert all(not np.array_equal(scene.image, other.image) for other in others)


def test_the_scenes_stay_the_same_over_versions() -> None:
    first = digits.draw_scene("test", 0, seed=0)
    assert digits_questions.caption(first) == "north 1, northeast 6, east 1, south 3."


def test_a_png_holds_the_picture_exactly(tmp_path) -> None:
    scene = digits.draw_scene("train", 0, seed=0)
    file = tmp_path / "scene.png"
    file.write_bytes(scene.png())
    with Image.open(file) as image:
        assert image.format == "PNG"
        assert np.array_equal(np.asarray(image), scene.image)


def test_scenes_of_one_layout_share_places_and_differ_in_digits() -> None:
    layouts = [
        [digits.draw_scene("train", 8 * layout + i, seed=0, scenes_per_layout=8) for i in range(8)]
        for layout in range(6)
    ]
    for group in layouts:
        assert len({scene.places for scene in group}) == 1
        assert len({scene.digits for scene in group}) > 3
    assert len({group[0].places for group in layouts}) > 3


@settings(max_examples=200)
@given(scenes, st.integers(0, 2**31), st.integers(1, 3))
def test_every_answer_is_right(scene: digits.Scene, seed: int, per_family: int) -> None:
    shown = dict(zip(scene.places, scene.digits, strict=True))
    questions = digits_questions.ask(scene, np.random.RandomState(seed), per_family=per_family)
    assert len({frozenset(question.text.split()) for question in questions}) == len(questions)
    counts = collections.Counter(question.family for question in questions)
    assert counts["read"] >= 1
    assert max(counts.values()) <= per_family
    assert ("compare" in counts) == (len(set(scene.digits)) > 1)
    for question in questions:
        work, answer = _solve(question.text, shown)
        assert (question.work, question.answer) == (work, answer)
        assert question.response == (f"{work} {answer}" if work else answer)
        assert digits_questions.conclusion(question.response) == answer


def _solve(text: str, shown: dict[str, int]) -> tuple[str, str]:
    """Work and answer of a question by its text alone, from place to digit."""
    values = list(shown.values())
    if match := re.fullmatch(r"Which digit is in the (\w+)\?", text):
        return "", str(shown[match[1]])
    if match := re.fullmatch(r"Is there a (\d)\?", text):
        return _checked(shown, match[1]), "yes" if int(match[1]) in values else "no"
    if text == "How many digits are there?":
        return ", ".join(shown) + ".", str(len(values))
    if match := re.fullmatch(r"How many of the digits are (\d)\?", text):
        return _checked(shown, match[1]), str(values.count(int(match[1])))
    match = re.fullmatch(r"Which digit is larger\?\nA. (\w+)\nB. (\w+)", text)
    first, second = match.groups()
    letter = "A" if shown[first] > shown[second] else "B"
    return f"{first} {shown[first]}, {second} {shown[second]}.", letter


def _checked(shown: dict[str, int], wanted: str) -> str:
    looks = [
        f"{place} {digit} {wanted} {'yes' if str(digit) == wanted else 'no'}"
        for place, digit in shown.items()
    ]
    return ", ".join(looks) + "."


# What a model gets that never looks: the best fixed answer, and the best answer to each wording.
@pytest.mark.parametrize(
    ("family", "majority", "majority_per_text"),
    [("read", 0.1, 0.1), ("presence", 0.5, 0.5), ("count", 0.26, 0.27), ("compare", 0.5, 0.5)],
)
def test_priors_answer_little(
    questions_by_family, family: str, majority: float, majority_per_text: float
) -> None:
    questions = questions_by_family[family]
    half = len(questions) // 2
    answers = collections.Counter(question.answer for question in questions)
    assert answers.most_common(1)[0][1] / len(questions) == pytest.approx(majority, abs=0.03)
    # Learned on one half and counted on the other, so that rare wordings earn nothing by chance.
    by_text = collections.defaultdict(collections.Counter)
    for question in questions[:half]:
        by_text[question.text][question.answer] += 1
    right = sum(
        question.answer == by_text[question.text].most_common(1)[0][0]
        for question in questions[half:]
        if question.text in by_text
    )
    assert right / half < majority_per_text + 0.05


def test_most_scenes_have_a_question_of_every_family(questions_by_family) -> None:
    assert tuple(sorted(questions_by_family)) == tuple(sorted(FAMILIES))
    for family in ("read", "presence", "count"):
        assert len(questions_by_family[family]) == SCENES
    assert len(questions_by_family["compare"]) / SCENES == pytest.approx(5 / 6, abs=0.03)
