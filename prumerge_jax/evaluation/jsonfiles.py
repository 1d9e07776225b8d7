"""JSON and JSON-lines files: errors that name file and row, writes that are complete or absent."""

import codecs
import json
import pathlib
from typing import Any, cast

from prumerge_jax.store.atomic import write_atomically
from prumerge_jax.store.strict_json import parse_json

Row = dict[str, Any]


def read_object(path: pathlib.Path) -> Row:
    """Parses a file of one JSON object.

    Raises:
      ValueError: The file is not strict UTF-8 JSON (see `strict_json.parse_json`; a byte order
        mark is skipped), or not an object; the message names it.
    """
    value = _read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object but {value!r:.80}")
    return value


def read_list(path: pathlib.Path) -> list[Any]:
    """Parses a file of one JSON list; errors as in `read_object`."""
    value = _read_json(path)
    if not isinstance(value, list):
        raise ValueError(f"{path} is not a JSON list but {value!r:.80}")
    return value


def _read_json(path: pathlib.Path) -> Any:
    return parse_json(read_file(path).removeprefix(codecs.BOM_UTF8), str(path))


def read_file(path: pathlib.Path) -> bytes:
    """The content of a regular file.

    Raises:
      OSError: It cannot be read, or is a FIFO or device, which could block forever.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
    return path.read_bytes()


def read_jsonl(path: pathlib.Path) -> list[Row]:
    """Parses a file of one JSON object per line; errors as in `parse_jsonl`."""
    return parse_jsonl(read_file(path), str(path))


def parse_jsonl(data: bytes, source: str) -> list[Row]:
    """Parses lines of one JSON object each; row n of error messages is line n of `source`, from 1.

    Raises:
      ValueError: A line is not a JSON object (a blank one is not either), or there is none.
    """
    rows = []
    # Lines end at "\n" alone: str.splitlines would also cut at U+2028 inside a text.
    lines = data.removeprefix(codecs.BOM_UTF8).removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines, start=1):
        where = f"{source} row {number}"
        if not line.strip():
            raise ValueError(f"{where} is blank; expected one JSON object per line")
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise ValueError(f"{where} is not a JSON object but {row!r:.80}")
        rows.append(row)
    return rows


def field(row: Any, name: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """`row[name]`, checked to be one of `kinds`.

    Raises:
      ValueError: The row is not a JSON object, or the field is missing or of another type; `where`
        names file and row.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where} is not a JSON object but {row!r:.80}")
    if name not in row:
        raise ValueError(f"{where} has no field {name!r}; it has {str(sorted(row)):.80}")
    value = row[name]
    # bool is an int to isinstance, and no benchmark has a boolean where a number belongs.
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        expected = kinds if isinstance(kinds, tuple) else (kinds,)
        names = " or ".join(kind.__name__ for kind in expected)
        raise ValueError(f"{where}: field {name!r} must be {names}, not {value!r:.80}")
    return value


def string(row: Any, name: str, where: str) -> str:
    """`row[name]`, checked to be a string; errors as in `field`."""
    return cast(str, field(row, name, str, where))


def dump_line(row: Row) -> str:
    """One JSON-lines line, newline included, non-ASCII escaped as LLaVA's scripts write it.

    Raises:
      ValueError: The row holds NaN or an infinity, which JSON cannot express.
    """
    return json.dumps(row, allow_nan=False) + "\n"


def strings(row: Any, name: str, where: str) -> list[str]:
    """`row[name]`, checked to be a list of strings; errors as in `field`."""
    values = field(row, name, list, where)
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"{where}: field {name!r} must hold strings only, not {value!r:.80}")
    return cast(list[str], values)


def replace_file(path: pathlib.Path, content: str | bytes) -> None:
    """Writes `path` so that a crash leaves the old file or the complete new one, never a part.

    Raises:
      OSError: The file could not be written, on a full disk for example; the message names it, and
        what was there before is as it was.
    """
    try:
        write_atomically(path, content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
