"""Normalising short answers, and the two soft accuracies that are easily confused.

EvalAI's answer processor as LLaVA copies it (llava/eval/m4c_evaluator.py), with its bugs, and the
official VQA scorer (GT-Vision-Lab/VQA, vqaEval.py). They share the steps for punctuation and for
words; they differ in what comes before, and in when they normalise at all.
"""

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")
# Upstream's pattern, `(?!<=\d)(\.)(?!\d)`, means to spare a period after a digit too, but its first
# group is a misspelt look-behind that is always true.
_PERIOD_BEFORE_NO_DIGIT = re.compile(r"\.(?!\d)")
# Upstream hands re.UNICODE, which is 32, to the `count` argument of `sub`.
_MOST_PERIODS = int(re.UNICODE)

_NUMBER_WORDS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_ARTICLES = frozenset(["a", "an", "the"])

_CONTRACTIONS_IN_FULL = """
'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've
should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def _misspellings(contraction: str) -> list[str]:
    """The contraction with any one of its apostrophes left out."""
    return [
        contraction[:i] + contraction[i + 1 :] for i, sign in enumerate(contraction) if sign == "'"
    ]


# Upstream's table lists every one of these pairs. It has four more for I'm, I've and I'd've, which
# a text in lower case never meets, and one the wrong way round, kept.
_CONTRACTIONS = {
    misspelling: contraction
    for contraction in _CONTRACTIONS_IN_FULL.split()
    for misspelling in _misspellings(contraction)
} | {"somebody'd": "somebodyd"}


def _replace_punctuation(text: str) -> str:
    """Deletes or blanks out each mark, then removes periods.

    A mark that touches a space anywhere in `text` is deleted everywhere, and so is every mark if a
    comma is between digits; any other becomes a space.
    """
    delete_all = _COMMA_BETWEEN_DIGITS.search(text) is not None
    replaced = text
    for mark in _PUNCTUATION:
        delete = delete_all or f"{mark} " in text or f" {mark}" in text
        replaced = replaced.replace(mark, "" if delete else " ")
    return _PERIOD_BEFORE_NO_DIGIT.sub("", replaced, count=_MOST_PERIODS)


def _replace_words(text: str) -> str:
    """Lower case; number words to digits, articles dropped, contractions repaired."""
    words = [_NUMBER_WORDS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize_evalai(text: str) -> str:
    """EvalAI's answer processor: what TextVQA is scored with, what VQAv2 and VizWiz upload."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _replace_words(_replace_punctuation(_one_line(text)))


def _soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the humans of min(1, m / 3), m of the *other* humans agreeing."""
    agreeing = sum(answer == prediction for answer in answers)
    each = [min(1.0, (agreeing - (answer == prediction)) / 3) for answer in answers]
    return sum(each) / len(each)


def m4c_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """TextVQA's soft accuracy in [0, 1]; prediction and answers are always normalised.

    Raises:
      ValueError: There are not exactly ten human answers.
    """
    if len(answers) != 10:
        raise ValueError(f"{len(answers)} human answers where the M4C scorer needs 10")
    normalized = [normalize_evalai(answer) for answer in answers]
    return _soft_accuracy(normalize_evalai(prediction), normalized)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """The official VQA scorer's soft accuracy in [0, 1].

    Unlike `m4c_accuracy` it compares the texts as they are when all humans gave one answer, and
    otherwise normalises without EvalAI's first steps (commas, `'s`).
    """
    prediction = _one_line(prediction)
    answers = [_one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction = _replace_words(_replace_punctuation(prediction))
        answers = [_replace_words(_replace_punctuation(answer)) for answer in answers]
    return _soft_accuracy(prediction, answers)
