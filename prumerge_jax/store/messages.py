"""Values as error messages quote them."""

LONGEST = 80
"""Characters of a quoted value."""


def quoted(value: object) -> str:
    """`repr(value)`, its middle left out where it is longer than `LONGEST`."""
    text = repr(value[: 2 * LONGEST]) if isinstance(value, str | bytes) else repr(value)
    if isinstance(value, str | bytes) and len(value) > 2 * LONGEST:
        return f"{text[: LONGEST - 3]}... ({len(value):,} characters)"
    return shortened(text)


def shortened(text: str) -> str:
    """The text, its middle left out where longer than `LONGEST`: paths differ at their end."""
    if len(text) <= LONGEST:
        return text
    half = (LONGEST - 3) // 2
    return f"{text[:half]}...{text[-half:]}"
