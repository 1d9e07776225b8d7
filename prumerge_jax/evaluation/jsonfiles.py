"""JSON and JSON-lines files: errors that name file and row, writes that are whole or absent."""

import json
import os
import pathlib
from typing import Any, cast

Row = dict[str, Any]


def read_json(path: pathlib.Path) -> Any:
    """Parses one JSON document.

    Raises:
      ValueError: The file is not UTF-8 JSON; the message names it.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON document: {error}") from error


def read_jsonl(path: pathlib.Path) -> list[Row]:
    """Parses a file of one JSON object per line; errors as in `parse_jsonl`."""
    return parse_jsonl(path.read_bytes(), str(path))


def parse_jsonl(data: bytes, source: str) -> list[Row]:
    """Parses lines of one JSON object each; row n of error messages is line n of `source`, from 1.

    Raises:
      ValueError: A line is not a JSON object (a blank one is not either), or there is none.
    """
    rows = []
    # Lines end at "\n" alone: str.splitlines would also cut at U+2028 inside a text.
    for number, line in enumerate(data.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{source} row {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{source} row {number} is not a JSON object but {row!r:.80}")
        rows.append(row)
    return rows


def field(row: Row, name: str, kinds: type | tuple[type, ...], where: str) -> Any:
    """`row[name]`, checked to be one of `kinds`.

    Raises:
      ValueError: The field is missing or of another type; `where` names file and row.
    """
    if name not in row:
        raise ValueError(f"{where} has no field {name!r}; it has {sorted(row)}")
    value = row[name]
    # bool is an int to isinstance, and no benchmark has a boolean where a number belongs.
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
        expected = kinds if isinstance(kinds, tuple) else (kinds,)
        names = " or ".join(kind.__name__ for kind in expected)
        raise ValueError(f"{where}: field {name!r} must be {names}, not {value!r:.80}")
    return value


def string(row: Row, name: str, where: str) -> str:
    """`row[name]`, checked to be a string; errors as in `field`."""
    return cast(str, field(row, name, str, where))


def dump_line(row: Row) -> str:
    """One JSON-lines line, newline included, non-ASCII escaped as LLaVA's scripts write it.

    Raises:
      ValueError: The row holds NaN or an infinity, which JSON cannot express.
    """
    return json.dumps(row, allow_nan=False) + "\n"


def replace_file(path: pathlib.Path, content: str | bytes) -> None:
    """Writes `path` so that a crash leaves the old file or the whole new one, never a part."""
    data = content.encode() if isinstance(content, str) else content
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_directory(path.parent)


def sync_directory(folder: pathlib.Path) -> None:
    """Makes the creation or renaming of a file in `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
