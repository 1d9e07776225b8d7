"""Names and values of the user's as error messages show them."""

import difflib
from collections.abc import Iterable

LIMIT = 80
"""Characters of a name or value."""


def quoted(value: object, limit: int = LIMIT) -> str:
    """`repr(value)` in one line, its middle left out where it is longer than `limit`."""
    return shortened(" ".join(repr(value).splitlines()), limit)


def shortened(text: str, limit: int = LIMIT) -> str:
    """The text, its middle left out where it is longer than `limit`: paths differ at their end."""
    if len(text) <= limit:
        return text
    tail = (limit - 3) // 2
    return f"{text[: limit - 3 - tail]}...{text[-tail:]}"


def nearest(name: object, known: Iterable[str]) -> str | None:
    """The known name most like one that is not known, None if none is like it."""
    close = difflib.get_close_matches(str(name)[:LIMIT], list(known), n=1, cutoff=0.5)
    return close[0] if close else None


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """`; did you mean 'X'?`, or nothing."""
    near = nearest(name, known)
    return "" if near is None else f"; did you mean {near!r}?"
