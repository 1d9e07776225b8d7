"""The words of a question that `mmtok` reads."""

import pytest

from prumerge_jax import reductions


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "What is the color of the dog?\nAnswer the question using a single word or phrase.",
            "color of dog",
        ),
        ("Where are you?", "Where are you?"),
        ("", ""),
        ("How many cups, and Who's THE man", "many cups s man"),
    ],
)
def test_keywords_are_what_can_be_seen(text: str, words: str) -> None:
    assert reductions.keywords(text) == words
