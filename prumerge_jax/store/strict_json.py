"""Strict JSON: bounded, UTF-8, no repeated keys, no NaN.

Files read here are untrusted input; whatever is wrong with one is said with its name.
"""

import collections
import dataclasses
import json
import pathlib
from typing import Any

_MAX_JSON_BYTES = 16 << 20


def load_json(path: pathlib.Path, max_bytes: int = _MAX_JSON_BYTES) -> Any:
    """Reads one JSON file strictly.

    Raises:
      ValueError: the file is larger than `max_bytes`, is not UTF-8, is not JSON, holds NaN or
        Infinity, or repeats a key within one object; the message names the file.
      OSError: it cannot be read.
    """
    return parse_json(read_bounded(path, max_bytes), str(path))


def read_bounded(path: pathlib.Path, max_bytes: int) -> bytes:
    """The content of a file.

    Raises:
      ValueError: it is larger than `max_bytes`.
      OSError: it cannot be read, or is not a regular file.
    """
    if path.exists() and not path.is_file():  # opening a FIFO would block
        raise OSError(f"{path} is not a regular file")
    with open(path, "rb") as file:
        raw = file.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise ValueError(f"{path}: larger than {max_bytes} bytes, which no such file needs")
    return raw


def parse_json(raw: bytes, where: str) -> Any:
    """Parses JSON as strictly as `load_json`; `where` names the text in errors."""
    try:
        return json.loads(
            raw.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
        )
    except RecursionError:
        raise ValueError(f"{where}: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None


def to_json(config: Any) -> dict[str, Any]:
    """A configuration dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), allow_nan=False))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        repeated = sorted(key for key, count in counts.items() if count > 1)
        raise ValueError(f"repeated keys {[key[:80] for key in repeated[:5]]}")
    return values


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not allowed")
