"""The fields of a checkpoint's configuration files, read by whitelist.

Fields that only steer training, caching or the Python side of transformers are not read.
Every field that would change a result is read, or must have a value that is supported.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from prumerge_jax.models.config_json import from_json
from prumerge_jax.store.strict_json import to_json

_ABSENT = object()
_TOO_LARGE = 1 << 62

Config = TypeVar("Config")


class ConversionError(ValueError):
    """A checkpoint cannot be converted: it is damaged, hostile, unsupported or incomplete."""


class Section:
    """One object of a configuration file, read field by field with defaults and types."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise ConversionError(f"{where}: expected an object, got {type(values).__name__}")
        self.values = values
        self.where = where

    def get(self, names: str | Sequence[str], kind: type, default: Any) -> Any:
        """A field under one of several spellings.

        Raises:
          ConversionError: of another type, or two spellings disagree.
        """
        names = [names] if isinstance(names, str) else names
        found = {name: self.values[name] for name in names if name in self.values}
        if not found:
            return default
        name, value = next(iter(found.items()))
        if any(other != value for other in found.values()):
            raise ConversionError(f"{self.where}: {' and '.join(found)} disagree")
        if value is None and default is None:
            return None
        accepted = (int, float) if kind is float else (kind,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise ConversionError(
                f"{self.where}: {name} is {value!r:.80}, expected {kind.__name__}"
            )
        if isinstance(value, int) and abs(value) >= _TOO_LARGE:
            raise ConversionError(f"{self.where}: {name} is {value!r:.80}, out of all bounds")
        return value

    def require(self, name: str, supported: Sequence[Any], default: Any = _ABSENT) -> Any:
        """A field of which only some values are supported; absent means `default`.

        Raises:
          ConversionError: another value; the message says which are supported.
        """
        value = self.values.get(name, supported[0] if default is _ABSENT else default)
        if not any(value == s and type(value) is type(s) for s in supported):
            expected = " or ".join(repr(s) for s in supported)
            raise ConversionError(
                f"{self.where}: {name} is {value!r:.80}; only {expected} is supported"
            )
        return value

    def section(self, name: str) -> "Section":
        """A nested object; absent or null means empty."""
        nested = self.values.get(name)
        return Section({} if nested is None else nested, f"{self.where}: {name}")


def built(kind: type[Config], where: str, /, **fields: Any) -> Config:
    """A configuration dataclass whose every field is within bounds.

    Raises:
      ConversionError: one is not, or fields contradict each other; `where` names the file.
    """
    try:
        return from_json(kind, to_json(kind(**fields)), where)
    except ValueError as error:
        message = str(error) if str(error).startswith(where) else f"{where}: {error}"
        raise ConversionError(message[:300]) from None
