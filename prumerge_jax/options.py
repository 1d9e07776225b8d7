"""Options of a method: frozen dataclasses whose annotations say what a field may hold.

A field is `bool`, a `Literal` of strings, or an `int` or `float` with `Bounds`, each `| None` where
it may be left open:

    neighbours: Annotated[int, Bounds(1, 100)] = 32

`check` refuses other values, `make` names that do not exist; `Option.read` reads a value from text.
"""

import dataclasses
import math
import numbers
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from prumerge_jax.messages import did_you_mean, quoted


class Bounds(typing.NamedTuple):
    """The least and the greatest value of a number, both allowed."""

    least: float
    greatest: float


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The message for a name that does not exist: the nearest one that does, and all of them."""
    known = sorted(known)
    hint = did_you_mean(name, known)
    expected = f"{hint} Expected" if hint else "; expected"
    return f"{what} {quoted(name)}{expected} one of {', '.join(known)}"


@dataclasses.dataclass(frozen=True)
class Option:
    """What one field may hold.

    Attributes:
      name: the field.
      kind: `bool`, `int`, `float` or, for a choice of words, `str`.
      words: the words of a choice.
      bounds: bounds of a number.
      may_be_none: whether None is a value.
      default: the value that the field has otherwise, `dataclasses.MISSING` where it has none.
    """

    name: str
    kind: type
    words: tuple[str, ...]
    bounds: Bounds | None
    may_be_none: bool
    default: Any

    @property
    def expected(self) -> str:
        """The allowed values in words."""
        if self.kind is bool:
            text = "True or False"
        elif self.kind is str:
            text = f"one of {', '.join(self.words)}"
        else:
            noun = "an integer" if self.kind is int else "a number"
            assert self.bounds is not None
            text = f"{noun} from {self.bounds.least} to {self.bounds.greatest}"
        return f"{text}, or None" if self.may_be_none else text

    def allows(self, value: Any) -> bool:
        """Whether the field may hold the value."""
        if value is None:
            return self.may_be_none
        if self.kind is str:
            return value in self.words
        if self.kind is bool or isinstance(value, bool):
            return self.kind is type(value)
        assert self.bounds is not None
        # NumPy's numbers count too.
        is_number = isinstance(value, numbers.Integral if self.kind is int else numbers.Real)
        least, greatest = self.bounds
        return is_number and math.isfinite(value) and least <= value <= greatest

    def read(self, text: str) -> Any:
        """The value that a text spells, or the text itself where it spells none."""
        if self.may_be_none and text == "None":
            return None
        if self.kind is bool:
            return {"True": True, "False": False, "true": True, "false": False}.get(text, text)
        if self.kind in (int, float):
            try:
                return self.kind(text)
            except ValueError:
                return text
        return text


def options(method: type) -> Mapping[str, Option]:
    """The fields of a dataclass, by name, in their order."""
    hints = typing.get_type_hints(method, include_extras=True)
    return {
        field.name: _option(field, hints[field.name])
        for field in dataclasses.fields(method)
        if field.init
    }


def _option(field: dataclasses.Field[Any], hint: Any) -> Option:
    may_be_none = type(None) in typing.get_args(hint)
    if may_be_none:
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    kind, words, bounds = hint, (), None
    if typing.get_origin(hint) is typing.Literal:
        kind, words = str, typing.get_args(hint)
    elif typing.get_origin(hint) is typing.Annotated:
        kind, bounds = typing.get_args(hint)
    elif hint is not bool:
        raise TypeError(f"field {field.name}: {hint} is not an option; see {__name__}")
    return Option(field.name, kind, words, bounds, may_be_none, field.default)


def check(method: object) -> None:
    """Refuses a value that its field may not hold; for `__post_init__`.

    Raises:
      ValueError: one line with the field, its value and what was expected.
    """
    for name, option in options(type(method)).items():
        if not option.allows(value := getattr(method, name)):
            raise ValueError(f"{name} is {quoted(value)}; expected {option.expected}")


def make(method: type, values: Mapping[str, Any]) -> Any:
    """`method(**values)`.

    Raises:
      ValueError: a value that is not allowed, or a field that does not exist or is missing.
    """
    fields = options(method)
    for name in values:
        if name not in fields:
            raise ValueError(unknown("no such parameter", name, fields))
    for name, option in fields.items():
        if option.default is dataclasses.MISSING and name not in values:
            raise ValueError(f"{name} is missing; expected {option.expected}")
    return method(**values)
