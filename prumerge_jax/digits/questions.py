"""Questions, answers and captions about the scenes of `digits.py`.

Four families mirror the benchmarks of LLaVA: `read` (TextVQA: what is written there), `presence`
(POPE: is it there, yes or no), `count` (GQA) and `compare` (ScienceQA: multiple choice by letter).
Answers are balanced, so that a model that does not look gets little: see `ask`.

Where an answer takes more than one look, the response shows its work first, as ScienceQA's
solutions do: `north 7, south 3. A`. A decoder of three layers spends them on looking one digit up
and has none left to compare two; with the work before it, the conclusion is about words nearby.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

import numpy as np

from prumerge_jax.digits import scenes as digits

FAMILIES = ("read", "presence", "count", "compare")
CAPTION_REQUEST = "Describe the picture."


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a scene, without the `<image>` mark.

    Attributes:
      family: one of `FAMILIES`.
      text: the question.
      answer: its one right answer.
      work: what has to be read off the image first, up to a full stop; empty where that is the
        answer.
    """

    family: str
    text: str
    answer: str
    work: str = ""

    @property
    def response(self) -> str:
        """What a model learns to say, the work first: `north 7, south 3. A`."""
        return f"{self.work} {self.answer}" if self.work else self.answer


_WORK = re.compile(rf"^(?:{'|'.join(digits.PLACES)})\b[^.]*\. ")


def conclusion(response: str) -> str:
    """The answer of a response: what follows the work, if it begins with any, else all of it."""
    return _WORK.sub("", response.strip())


def caption(scene: digits.Scene) -> str:
    """What a scene shows, in reading order: `northwest 7, south 3.`"""
    return caption_of(scene.places, scene.digits)


def caption_of(places: Sequence[str], shown: Sequence[int]) -> str:
    """The caption of digits at places."""
    return _listed(f"{place} {digit}" for place, digit in zip(places, shown, strict=True))


def _listed(looks: Iterable[str]) -> str:
    return ", ".join(looks) + "."


def ask(
    scene: digits.Scene, random: np.random.RandomState, *, per_family: int = 1
) -> list[Question]:
    """Asks up to `per_family` different questions of each family, in random order.

    A scene with too few digits for that many different questions gets fewer; a scene of one digit
    gets no `compare` question.

    Balance: `read` asks for a random occupied place, so each digit is the answer equally often;
    `presence` first tosses a coin for yes or no, then draws the digit; `count` asks in half of the
    cases for the number of all digits (1 to 6, equally often) and otherwise for the number of one
    digit, where scenes with repeated digits keep 2 and 3 frequent; in `compare` the larger digit
    is A or B by a coin.
    """
    questions: dict[frozenset[str], Question] = {}
    for family in FAMILIES:
        for _ in range(per_family):
            question = _ASK[family](scene, random)
            if question is not None:
                # By words in no order: `compare` with its options swapped is not a new question.
                questions.setdefault(frozenset(question.text.split()), question)
    asked = list(questions.values())
    return [asked[position] for position in random.permutation(len(asked))]


def draw_with_questions(
    split: str,
    index: int,
    *,
    seed: int,
    scenes_per_layout: int = 1,
    questions_per_family: int = 1,
) -> tuple[digits.Scene, list[Question]]:
    """Draws scene `index` of a split and the questions that `digits_vqa` stores about it."""
    scene = digits.draw_scene(split, index, seed=seed, scenes_per_layout=scenes_per_layout)
    random = digits.scene_random(seed, split, index, purpose=2)
    return scene, ask(scene, random, per_family=questions_per_family)


def vocabulary_texts() -> list[str]:
    """Texts that together hold every word, digit, letter and mark of this data set."""
    return [
        "north 0, south 1.",
        CAPTION_REQUEST,
        *(_read_text(place) for place in digits.PLACES),
        *(_presence_text(digit) for digit in range(10)),
        _COUNT_ALL_TEXT,
        *(_count_text(digit) for digit in range(10)),
        *(_compare_text(place, place) for place in digits.PLACES),
        *("yes", "no", "A", "B"),
        *(str(digit) for digit in range(10)),
    ]


_COUNT_ALL_TEXT = "How many digits are there?"


def _read_text(place: str) -> str:
    return f"Which digit is in the {place}?"


def _presence_text(digit: int) -> str:
    return f"Is there a {digit}?"


def _count_text(digit: int) -> str:
    return f"How many of the digits are {digit}?"


def _compare_text(first: str, second: str) -> str:
    return f"Which digit is larger?\nA. {first}\nB. {second}"


def _ask_read(scene: digits.Scene, random: np.random.RandomState) -> Question:
    position = random.randint(len(scene.places))
    return Question("read", _read_text(scene.places[position]), str(scene.digits[position]))


def _ask_presence(scene: digits.Scene, random: np.random.RandomState) -> Question:
    present = random.rand() < 0.5
    digit = _pick([d for d in range(10) if (d in scene.digits) == present], random)
    return Question(
        "presence", _presence_text(digit), "yes" if present else "no", _checked(scene, digit)
    )


def _ask_count(scene: digits.Scene, random: np.random.RandomState) -> Question:
    if random.rand() < 0.5:
        return Question("count", _COUNT_ALL_TEXT, str(len(scene.digits)), _listed(scene.places))
    counts = [scene.digits.count(digit) for digit in range(10)]
    repeated = [digit for digit in range(10) if counts[digit] > 1]
    if repeated and random.rand() < 0.7:
        digit = _pick(repeated, random)
    else:
        wanted = random.randint(2) if 1 in counts else 0
        digit = _pick([digit for digit in range(10) if counts[digit] == wanted], random)
    return Question("count", _count_text(digit), str(counts[digit]), _checked(scene, digit))


def _ask_compare(scene: digits.Scene, random: np.random.RandomState) -> Question | None:
    if len(set(scene.digits)) < 2:
        return None
    first, second = random.permutation(len(scene.digits))[:2]
    while scene.digits[first] == scene.digits[second]:
        first, second = random.permutation(len(scene.digits))[:2]
    places = scene.places[first], scene.places[second]
    shown = scene.digits[first], scene.digits[second]
    letter = "A" if shown[0] > shown[1] else "B"
    return Question("compare", _compare_text(*places), letter, caption_of(places, shown))


def _checked(scene: digits.Scene, wanted: int) -> str:
    """Each digit, the wanted one, and whether they are the same: `south 3 7 no, west 7 7 yes.`

    The wanted digit is repeated each time, so that what is compared is side by side. Without
    it (`north 3 no`) small decoders have to find it among the digits of earlier answers.
    """
    marks = ("yes" if digit == wanted else "no" for digit in scene.digits)
    shown = zip(scene.places, scene.digits, marks, strict=True)
    return _listed(f"{place} {digit} {wanted} {mark}" for place, digit, mark in shown)


def _pick(choices: list[int], random: np.random.RandomState) -> int:
    return choices[random.randint(len(choices))]


_ASK = {
    "read": _ask_read,
    "presence": _ask_presence,
    "count": _ask_count,
    "compare": _ask_compare,
}
