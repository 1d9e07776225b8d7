"""Configurations as JSON: every field named, typed and bounded, nothing else accepted.

A `config.json` is untrusted input. No key of it is ever used as a name to import, call or fetch;
integers are bounded before any shape is built from them.
"""

import collections
import dataclasses
import json
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

# Inclusive bounds of every number in a configuration, by field name.
_BOUNDS: dict[str, tuple[float, float]] = {
    "image_size": (1, 8192),
    "patch_size": (1, 8192),
    "width": (1, 1 << 16),
    "mlp_width": (1, 1 << 18),
    "num_layers": (1, 1024),
    "num_heads": (1, 1024),
    "num_kv_heads": (1, 1024),
    "head_dim": (1, 1024),
    "vocab_size": (1, 1 << 21),
    "max_positions": (1, 1 << 24),
    "layer_norm_eps": (0, 1),
    "rms_norm_eps": (0, 1),
    "rope_theta": (1, 1e12),
    "image_token_id": (0, 1 << 21),
    "pad_token_id": (0, 1 << 21),
    "bos_token_id": (0, 1 << 21),
    "eos_token_id": (0, 1 << 21),
    "pixel_mean": (-1e3, 1e3),
    "pixel_std": (1e-6, 1e3),
    "rank": (1, 1 << 14),
    "alpha": (1e-6, 1e6),
    "dropout": (0, 1),
}
_MAX_STRING = 64
_MAX_JSON_BYTES = 16 << 20

Config = TypeVar("Config")


def load_json(path: pathlib.Path, max_bytes: int = _MAX_JSON_BYTES) -> Any:
    """Reads one JSON file strictly.

    Raises:
      ValueError: the file is larger than `max_bytes`, is not UTF-8, is not JSON, holds NaN or
        Infinity, or repeats a key within one object; the message names the file.
      OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise ValueError(f"{path}: larger than {max_bytes} bytes, which no such file needs")
    return parse_json(raw, str(path))


def parse_json(raw: bytes, where: str) -> Any:
    """Parses JSON as strictly as `load_json`; `where` names the text in errors."""
    try:
        return json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply for a configuration") from None
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None


def to_json(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))


def from_json(kind: type[Config], values: Any, where: str) -> Config:
    """Builds the dataclass `kind` from parsed JSON.

    Args:
      kind: a frozen dataclass of numbers, strings, tuples of numbers and further dataclasses.
      values: parsed JSON; every field must be there and nothing else.
      where: names the values in errors, for example `config.json: model`.

    Raises:
      ValueError: a field is missing, unknown, of another type or out of bounds.
    """
    fields = typing.get_type_hints(kind)
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected an object, got {type(values).__name__}")
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{where}: unknown fields {unknown}; expected {sorted(fields)}")
    if missing := sorted(set(fields) - set(values)):
        raise ValueError(f"{where}: missing fields {missing}")
    try:
        return kind(**{n: _value(n, t, values[n], f"{where}.{n}") for n, t in fields.items()})
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(where) else f"{where}: {message}") from None


def _value(name: str, annotation: Any, value: Any, where: str) -> Any:
    if isinstance(annotation, types.UnionType):  # `int | None`
        if value is None:
            return None
        (annotation,) = (t for t in typing.get_args(annotation) if t is not type(None))
    if dataclasses.is_dataclass(annotation):
        return from_json(typing.cast(type[Any], annotation), value, where)
    if typing.get_origin(annotation) is tuple:
        items = typing.get_args(annotation)
        if not isinstance(value, list) or len(value) != len(items):
            raise ValueError(f"{where}: expected a list of {len(items)} numbers, got {value!r}")
        return tuple(
            _value(name, t, v, f"{where}[{i}]")
            for i, (t, v) in enumerate(zip(items, value, strict=True))
        )
    if annotation is str:
        if not isinstance(value, str) or len(value) > _MAX_STRING:
            raise ValueError(f"{where}: expected a string of at most {_MAX_STRING} characters")
        return value
    return _number(name, annotation, value, where)


def _number(name: str, annotation: Any, value: Any, where: str) -> int | float:
    accepted = (int,) if annotation is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise ValueError(f"{where}: expected {annotation.__name__}, got {value!r:.80}")
    low, high = _BOUNDS[name]
    if not low <= value <= high:  # also refuses NaN
        raise ValueError(f"{where}: {value!r:.80} is outside {low} to {high}")
    return annotation(value)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        repeated = sorted(key for key, count in counts.items() if count > 1)
        raise ValueError(f"repeated keys {repeated[:5]}")
    return values


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not allowed")
