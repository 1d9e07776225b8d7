"""Stop strings: found wherever pieces break, held back, never sent."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.serve.text import StoppingText
from tests.serve.fakes import miniature


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return miniature().tokenizer


def pieces_of(tokenizer: Tokenizer, text: str, stops: list[str]) -> tuple[list[str], bool]:
    stopping = StoppingText(tokenizer, stops)
    pieces = [stopping.push([token]) for token in tokenizer.encode(text)]
    pieces.append(stopping.finish())
    return pieces, stopping.stopped


@given(
    text=st.text("ab \nµ😀", max_size=30), stops=st.lists(st.text("ab \n", min_size=1), max_size=4)
)
def test_as_if_cut_afterwards(text: str, stops: list[str]) -> None:
    tokenizer = miniature().tokenizer
    whole = tokenizer.decode(tokenizer.encode(text))
    found = [at for stop in stops if (at := whole.find(stop)) >= 0]
    pieces, stopped = pieces_of(tokenizer, text, stops)
    assert "".join(pieces) == whole[: min(found, default=None)]
    assert stopped == bool(found)


def test_nothing_that_may_be_a_stop_is_sent_early(tokenizer: Tokenizer) -> None:
    pieces, stopped = pieces_of(tokenizer, "abcdabce", ["abcde", "ce"])
    assert stopped
    assert "".join(pieces) == "abcdab"
    assert all("abcda" not in "".join(pieces[:end]) or end > 5 for end in range(len(pieces)))


def test_what_was_held_back_comes_at_the_end(tokenizer: Tokenizer) -> None:
    pieces, stopped = pieces_of(tokenizer, "one two", ["two three"])
    assert not stopped
    assert "".join(pieces) == "one two"
    assert pieces[-1].endswith("two")
