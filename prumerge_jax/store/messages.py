"""Names and values of the user's as error messages show them."""

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
