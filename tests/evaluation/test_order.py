"""The order of questions: those about one image together, within a stretch."""

from prumerge_jax.evaluation import order
from prumerge_jax.evaluation.benchmarks.base import Question


def ordered(images: str, rows: list[int] | None = None) -> str:
    """Images, one letter each, in the order in which questions about them are answered."""
    questions = [Question(str(i), None if x == "-" else x, "?") for i, x in enumerate(images)]
    found = order.by_image(range(len(images)) if rows is None else rows, questions)
    assert sorted(found) == sorted(range(len(images)) if rows is None else rows)
    return "".join(images[row] for row in found)


def test_questions_about_an_image_follow_each_other(monkeypatch) -> None:
    assert ordered("") == ""
    assert ordered("aabbc") == "aabbc"
    assert ordered("abcabcab") == "aaabbbcc"
    assert ordered("a-b-a") == "aa-b-"
    assert ordered("abab", [1, 2, 3]) == "bba"
    monkeypatch.setattr(order, "STRETCH", 4)
    assert ordered("ababababc") == "aabbaabbc"


def test_rows_keep_their_order_among_those_of_an_image() -> None:
    questions = [Question(str(i), image, "?") for i, image in enumerate("abab")]
    assert order.by_image(range(4), questions) == [0, 2, 1, 3]
    same = [Question(str(i), b"the same bytes", "?") for i in range(3)]
    assert order.by_image([2, 0, 1], same) == [2, 0, 1]
