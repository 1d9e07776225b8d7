"""LLaVA's answers.jsonl: one line per question, in the order of the question file.

`{"question_id", "prompt", "text", "answer_id", "model_id", "metadata": {}}`; MMBench has more
fields. Written by llava/eval/model_vqa_loader.py and its siblings, read by every scorer.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence

from prumerge_jax.evaluation import jsonfiles

Fingerprint = Mapping[str, str | int | float | bool | None]

# shortuuid's alphabet: 57 signs, without those that look alike. 22 of them hold 128 bits.
_ID_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_ID_LENGTH = 22


@dataclasses.dataclass(frozen=True)
class Answers:
    """The lines of one answers file, and the name under which error messages mention it."""

    source: str
    rows: Sequence[jsonfiles.Row]


def read_answers(path: pathlib.Path) -> Answers:
    """Reads and validates an answers file.

    Raises:
      ValueError: A line is not JSON or lacks `question_id`, `prompt` or `text`; the message names
        file and row. (The reference's converters skip such lines.)
    """
    rows = jsonfiles.read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        where = f"{path} row {number}"
        jsonfiles.field(row, "question_id", (int, str), where)
        jsonfiles.string(row, "prompt", where)
        jsonfiles.string(row, "text", where)
    return Answers(str(path), rows)


def write_answers(path: pathlib.Path, rows: Sequence[jsonfiles.Row]) -> None:
    """Writes an answers file completely or not at all."""
    jsonfiles.replace_file(path, "".join(map(jsonfiles.dump_line, rows)))


def answer_id(index: int, fingerprint: Fingerprint) -> str:
    """A 22-character identifier that looks like the reference's shortuuid.

    The reference draws it at random. Here it is a hash of the row's place in the question file and
    of the run's fingerprint, so that a repeated run writes the same bytes, while answers of
    different runs have different ids (a LLaVA-Bench review names the answer that it reviewed).
    """
    seed = json.dumps([index, dict(fingerprint)], sort_keys=True).encode()
    number = int.from_bytes(hashlib.sha256(seed).digest()[:16], "big")
    signs = []
    for _ in range(_ID_LENGTH):
        number, sign = divmod(number, len(_ID_ALPHABET))
        signs.append(_ID_ALPHABET[sign])
    return "".join(reversed(signs))


def complete_row(
    row: jsonfiles.Row, *, index: int, fingerprint: Fingerprint, model_id: str
) -> jsonfiles.Row:
    """A line of the answers file from a benchmark's `answer_row`: the three common fields added."""
    return {
        **row,
        "answer_id": answer_id(index, fingerprint),
        "model_id": model_id,
        "metadata": {},
    }
