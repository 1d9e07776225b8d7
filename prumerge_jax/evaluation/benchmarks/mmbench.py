"""MMBench and MMBench-CN (arXiv 2307.06281; llava/eval/model_vqa_mmbench.py)."""

import base64
import binascii
import csv
import importlib.util
import io
import pathlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from prumerge_jax.evaluation import jsonfiles
from prumerge_jax.evaluation.answers import Answers
from prumerge_jax.evaluation.benchmarks.base import LETTER_INSTRUCTION, Benchmark, Question

_LETTERS = "ABCD"
_ROTATION = 1_000_000
_TO_SPACES = str.maketrans({mark: " " for mark in ".()[],:;!*#{}"})
# The reference reads the table with pandas, for which these cells are missing ones.
_PANDAS_MISSING = frozenset(
    ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"]
    + ["<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"]
)
_NO_OPENPYXL = "the MMBench server takes a spreadsheet, which needs openpyxl: pip install openpyxl"
_UPLOAD_COLUMNS = ("index", "question", *_LETTERS, "prediction", "answer", "split")


def is_missing(cell: str) -> bool:
    """Whether a cell counts as no option or no hint."""
    return cell in _PANDAS_MISSING or cell.lower() in ("nan", "none")


def parse_option(text: str, options: Sequence[str]) -> str | None:
    """The letter an answer chooses, or None.

    A single option letter among the words, unless it is an A that may be the article; else the one
    option whose text the answer contains. These are the rules of the official toolkit (VLMEvalKit)
    that come before it asks a language model, which is not done here.
    """
    letters = _LETTERS[: len(options)]
    words = text.translate(_TO_SPACES).split()
    named = [letter for letter in letters if letter in words]
    if len(named) == 1 and not ("A" in words and len(words) > 3):
        return named[0]
    contained = [
        letter
        for letter, option in zip(letters, options, strict=True)
        if option.lower() in text.lower()
    ]
    return contained[0] if len(contained) == 1 else None


class MmBench(Benchmark[None]):
    """Multiple choice, each question asked once per rotation of its options, a row each.

    Papers report CircularEval, `accuracy_circular`: all rotations of a question right. The truth is
    the table's column `answer`; the test split has none and goes to the server.
    """

    max_new_tokens = 1024
    headline = "accuracy_circular"
    needs_annotations = False

    def __init__(self, name: str, instruction: str) -> None:
        self.name = name
        self._instruction = instruction

    def read_questions(self, path: pathlib.Path) -> list[Question]:
        """Reads a tsv with base64 images.

        An image cell that is a number refers to the row of that index, as in the newer downloads.
        """
        rows = list(_read_table(path))
        image_cells = {row["index"]: row["image"] for _, row in rows}
        questions = []
        for where, row in rows:
            cell = image_cells.get(row["image"], row["image"])
            questions.append(self._question(row, _decode(cell, where), where))
        if not questions:
            raise ValueError(f"{path} has no rows")
        self.check_distinct(questions, path)
        return questions

    def answer_row(self, question: Question, text: str) -> jsonfiles.Row:
        """The prompt is stored without the instruction."""
        options = question.extra["options"]
        return {
            "question_id": question.question_id,
            "round_id": 0,
            "prompt": question.extra["prompt"],
            "text": text,
            "options": list(options),
            "option_char": list(_LETTERS[: len(options)]),
        }

    def read_annotations(self, path: pathlib.Path) -> None:
        """There are none other than the question table."""
        raise ValueError(f"{self.name} takes its answers from the question table, not from {path}")

    def per_question(
        self, questions: Sequence[Question], answers: Answers, annotations: None
    ) -> dict[str, np.ndarray]:
        """Right or wrong; nothing for a split without answers.

        `accuracy_circular` per question, all its rotations right; `accuracy_vanilla` per question,
        the first row alone; `accuracy_row_wise` per row.
        """
        unknown = [q.question_id for q in questions if q.extra["cells"].get("answer") is None]
        if len(unknown) == len(questions):
            return {}
        if unknown:
            raise ValueError(f"the question table has no answer in the row of index {unknown[0]}")
        right: dict[int, dict[int, bool]] = {}
        for question, row in zip(
            questions, self.in_question_order(questions, answers), strict=True
        ):
            rotation, base = divmod(int(question.question_id), _ROTATION)
            letter = parse_option(row["text"], question.extra["options"])
            right.setdefault(base, {})[rotation] = letter == question.extra["cells"]["answer"]
        by_base = right.values()
        values = {
            "accuracy_circular": [all(rotations.values()) for rotations in by_base],
            "accuracy_vanilla": [rotations[0] for rotations in by_base if 0 in rotations],
            "accuracy_row_wise": [hit for rotations in by_base for hit in rotations.values()],
        }
        return {name: np.array(hits, np.float64) for name, hits in values.items() if hits}

    def upload_problem(self, questions: Sequence[Question], annotations: None) -> str | None:
        """That openpyxl, an optional dependency, is not installed."""
        if importlib.util.find_spec("openpyxl") is None:
            return _NO_OPENPYXL
        return None

    def upload_files(
        self, questions: Sequence[Question], answers: Answers, annotations: None
    ) -> Mapping[str, str | bytes]:
        """NAME_upload.xlsx, the table without images and with a column `prediction`.

        Raises:
          ModuleNotFoundError: openpyxl, an optional dependency, is not installed.
        """
        rows = []
        for question, row in zip(
            questions, self.in_question_order(questions, answers), strict=True
        ):
            cells = {"index": question.question_id, **question.extra["cells"]}
            rows.append({**cells, "prediction": row["text"]})
        return {f"{self.name}_upload.xlsx": _xlsx(rows)}

    def _question(self, row: Mapping[str, str], image: bytes, where: str) -> Question:
        try:
            index = int(row["index"])
        except ValueError:
            raise ValueError(f"{where}: index {row['index']!r:.80} is not an integer") from None
        options: list[str] = []
        for letter in _LETTERS:
            if is_missing(row[letter]):
                break
            options.append(row[letter])
        if not options:
            raise ValueError(f"{where} (index {index}) has no options")
        lines = [] if is_missing(row["hint"]) else [row["hint"]]
        lines.append(row["question"])
        lines += [f"{letter}. {option}" for letter, option in zip(_LETTERS, options, strict=False)]
        prompt = "\n".join(lines)
        cells = {
            name: None if is_missing(row[name]) else row[name]
            for name in _UPLOAD_COLUMNS
            if name in row and name != "index"
        }
        extra = {"prompt": prompt, "options": tuple(options), "cells": cells}
        return Question(index, image, f"{prompt}\n{self._instruction}", extra)


def _read_table(path: pathlib.Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(file and line for error messages, row by column name) of each row."""
    longest = csv.field_size_limit(1 << 30)
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t")
            needed = {"index", "image", "question", "hint", *_LETTERS}
            lacking = needed - set(reader.fieldnames or ())
            if lacking:
                raise ValueError(f"{path} has no columns {sorted(lacking)}")
            for row in reader:
                where = f"{path} line {reader.line_num}"
                if None in row or None in row.values():
                    raise ValueError(f"{where} has another number of cells than the header")
                yield where, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is not a table in UTF-8 with tabs: {error}") from error
    finally:
        csv.field_size_limit(longest)


def _decode(cell: str, where: str) -> bytes:
    try:
        image = base64.b64decode(cell, validate=True)
    except binascii.Error as error:
        raise ValueError(f"{where}: the image is not base64: {error}") from error
    if not image or cell.isdigit():
        raise ValueError(f"{where}: no image, nor the index of a row with one: {cell!r:.40}")
    return image


def _xlsx(rows: Sequence[Mapping[str, str | int | None]]) -> bytes:
    try:
        import openpyxl
        from openpyxl.cell import WriteOnlyCell
    except ImportError as error:
        raise ModuleNotFoundError(_NO_OPENPYXL) from error
    columns = [name for name in _UPLOAD_COLUMNS if name in rows[0]]
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet("Sheet1")
    sheet.append(columns)
    for row in rows:
        cells = []
        for name in columns:
            cell = WriteOnlyCell(sheet, row[name])
            if isinstance(row[name], str):
                cell.data_type = "s"  # an answer that starts with "=" is not a formula
            cells.append(cell)
        sheet.append(cells)
    content = io.BytesIO()
    book.save(content)
    return content.getvalue()


MMBENCH = MmBench("mmbench", LETTER_INSTRUCTION)
MMBENCH_CN = MmBench("mmbench_cn", "请直接回答选项字母。")
