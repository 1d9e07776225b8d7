"""The scoring journal: a run that is killed at any moment resumes where it was.

One JSON-lines file. Its first line is the fingerprint of the run; then one line per finished row,
appended and fsynced a batch at a time. Every line ends in a CRC-32 of its content, that of a
row continued from the fingerprint's. So a line that was damaged or edited, or belongs to another
run, is noticed and reported, and its row is scored again. Opening the journal locks it, cuts off a
line that a crash left incomplete and refuses another run's fingerprint. The answers file is written
from it at the end, in input order, by rename: the same bytes whether or not a run was interrupted.

Of several processes each writes a journal of its own and includes what the others' hold, see
`shares`.
"""

import dataclasses
import fcntl
import json
import math
import os
import pathlib
import re
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any, Self

from prumerge_jax.evaluation import jsonfiles
from prumerge_jax.evaluation.answers import Fingerprint, write_answers
from prumerge_jax.store.atomic import sync_folder
from prumerge_jax.store.strict_json import parse_json

_START = b'{"fingerprint": '
_CHECKSUM = re.compile(rb', "crc32": "([0-9a-f]{8})"\}')


@dataclasses.dataclass(frozen=True)
class RowOutcome:
    """The outcome of one row of the question file.

    Attributes:
      index: Place in the question file, from 0. (Question ids repeat in some benchmarks.)
      question_id: For the error report.
      answer: The line of the answers file, or None if the row failed.
      error: Why the row failed, or None.
      measured: Finite numbers to summarise over the run, such as the count of visual tokens.
    """

    index: int
    question_id: int | str
    answer: Mapping[str, Any] | None = None
    error: str | None = None
    measured: Mapping[str, int | float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if type(self.index) is not int:
            raise ValueError(f"row index {self.index!r:.80} is not an integer")
        where = f"row {self.index + 1}"
        jsonfiles.field(vars(self), "question_id", (int, str), where)
        if (self.answer is None) == (self.error is None):
            raise ValueError(f"{where} needs either an answer or an error")
        if self.answer is not None:
            for name in ("prompt", "text"):
                jsonfiles.string(self.answer, name, f"{where}, answer")
        else:
            jsonfiles.string(vars(self), "error", where)
        for name in jsonfiles.field(vars(self), "measured", dict, where):
            value = jsonfiles.field(self.measured, name, (int, float), f"{where}, measured")
            if not math.isfinite(value):
                raise ValueError(f"{where}: measured {name} is {value}, which JSON cannot express")


class Journal:
    """The open journal of a scoring run; a context manager, and the file's only writer.

    A failed row is tried again by the next run, because its cause (a missing image, say) may have
    been fixed; an answered row is not.
    """

    def __init__(self, path: pathlib.Path, fingerprint: Fingerprint, num_rows: int) -> None:
        """Opens or starts the journal; says on standard error which lines are damaged.

        Args:
          path: The journal file; its folder must exist.
          fingerprint: Flat mapping of all that determines the answers: hashes of weights and
            prompts, reduction, decoding settings, code version.
          num_rows: Number of rows of the question file.

        Raises:
          RuntimeError: Another process writes this journal.
          ValueError: The file is not a journal, belongs to a run of another fingerprint, or is so
            damaged that no line is known to be of this run. It is left as it is.
        """
        self.path = path
        self._num_rows = num_rows
        self._seed = zlib.crc32(_header(dict(fingerprint)))
        self._outcomes: dict[int, RowOutcome] = {}
        self._file = path.open("a+b", buffering=0)
        try:
            _lock(self._file, path)
            self._recover(dict(fingerprint))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file and lets go of the lock."""
        self._file.close()

    @property
    def outcomes(self) -> Mapping[int, RowOutcome]:
        """What is known, by row index; for a row tried again the latest."""
        return self._outcomes

    @property
    def unanswered(self) -> list[int]:
        """Indices of the rows to score, ascending: those never tried and those that failed."""
        return [
            index
            for index in range(self._num_rows)
            if index not in self._outcomes or self._outcomes[index].answer is None
        ]

    def include(self, outcomes: Mapping[int, RowOutcome]) -> None:
        """Takes over what another journal of this run holds; nothing is written.

        An answer that is known stays, an error does not.
        """
        for index, outcome in outcomes.items():
            known = self._outcomes.get(index)
            if known is None or known.answer is None:
                self._outcomes[index] = outcome

    def append(self, outcomes: Sequence[RowOutcome]) -> None:
        """Makes a batch durable: when this returns, a crash no longer loses it.

        Raises:
          ValueError: A row is out of range or has an answer already. Nothing is written.
          OSError: The batch could not be written; the journal is as it was before.
        """
        batch: dict[int, RowOutcome] = {}
        for outcome in outcomes:
            _check(outcome, self._outcomes, self._num_rows)
            if outcome.index in batch:
                raise ValueError(f"row {outcome.index + 1} is twice in one batch")
            batch[outcome.index] = outcome
        self._write(b"".join(_line(dataclasses.asdict(o), self._seed) for o in outcomes))
        self._outcomes |= batch

    def write_results(self, folder: pathlib.Path) -> None:
        """Writes answers.jsonl and errors.jsonl, each complete or not at all, in input order.

        Raises:
          ValueError: A row has neither an answer nor an error yet.
          OSError: A file could not be written; the message names it.
        """
        untried = [index for index in range(self._num_rows) if index not in self._outcomes]
        if untried:
            raise ValueError(
                f"{self.path}: {len(untried)} of {self._num_rows} rows are not scored yet, the "
                f"first is row {untried[0] + 1}"
            )
        ordered = [self._outcomes[index] for index in range(self._num_rows)]
        answers = [dict(outcome.answer) for outcome in ordered if outcome.answer is not None]
        write_answers(folder / "answers.jsonl", answers)
        errors = [
            {
                "row": outcome.index + 1,
                "question_id": outcome.question_id,
                "error": outcome.error,
            }
            for outcome in ordered
            if outcome.error is not None
        ]
        lines = "".join(map(jsonfiles.dump_line, errors))
        jsonfiles.replace_file(folder / "errors.jsonl", lines)

    def _recover(self, fingerprint: dict[str, Any]) -> None:
        data = self.path.read_bytes()
        found = _read(self.path, data, fingerprint, self._num_rows)
        # Only now that the file is known to be this run's journal may it be changed.
        found.say(self.path)
        if found.end < len(data):
            self._truncate(found.end)
        if not found.end:
            self._write(_header(fingerprint))
            sync_folder(self.path.parent)
        self._outcomes |= found.outcomes

    def _write(self, data: bytes) -> None:
        end = os.fstat(self._file.fileno()).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._file.fileno(), view) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            # A part of a line would swallow the next one appended to it.
            self._truncate(end)
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def _truncate(self, size: int) -> None:
        os.ftruncate(self._file.fileno(), size)
        os.fsync(self._file.fileno())


def read_outcomes(
    path: pathlib.Path, fingerprint: Fingerprint, num_rows: int, *, is_idle: bool
) -> dict[int, RowOutcome]:
    """What a journal holds that another process writes or wrote, by row index.

    Damaged lines are left out; whoever opens the journal to write says which.

    Args:
      path, fingerprint, num_rows: as for `Journal`.
      is_idle: whether no process of this run writes it.

    Raises:
      RuntimeError: it is idle, and yet a process writes it.
      ValueError: as for `Journal`.
      OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if is_idle:
            _lock(file, path, fcntl.LOCK_SH)
        return _read(path, file.read(), dict(fingerprint), num_rows).outcomes


def check_same_run(path: pathlib.Path, fingerprint: Fingerprint) -> None:
    """Whether a journal can be resumed, as far as its first line tells; a missing one can.

    Raises:
      ValueError: It belongs to a run of another fingerprint.
    """
    if path.exists():
        with path.open("rb") as file:
            _check_header(path, file.readline().removesuffix(b"\n"), dict(fingerprint))


@dataclasses.dataclass
class _Lines:
    """The complete lines of a journal.

    Attributes:
      outcomes: by row index; for a row tried again the latest.
      problems: what is wrong with a line, by its number from 1.
      end: bytes of all complete lines.
    """

    outcomes: dict[int, RowOutcome]
    problems: dict[int, str]
    end: int

    def say(self, path: pathlib.Path) -> None:
        for number, problem in self.problems.items():
            print(
                f"{path} line {number} {problem}; a row without an intact line is scored again",
                file=sys.stderr,
            )


def _read(path: pathlib.Path, data: bytes, fingerprint: dict[str, Any], num_rows: int) -> _Lines:
    """Takes over every line that is intact, in order."""
    found = _Lines({}, {}, data.rfind(b"\n") + 1)
    header, *lines = data[: found.end].removesuffix(b"\n").split(b"\n")
    if found.end:
        _check_header(path, header, fingerprint)
        _read_rows(path, lines, zlib.crc32(_header(fingerprint)), num_rows, found)
        if header + b"\n" != _header(fingerprint):
            found.problems = {1: "is damaged", **found.problems}
    elif not data.startswith(_START) and not _START.startswith(data):
        raise _foreign(path)
    if 1 in found.problems and not found.outcomes:
        raise _foreign(path)
    if found.end < len(data):
        found.problems[data.count(b"\n") + 1] = "is cut short"
    return found


def _read_rows(
    path: pathlib.Path, lines: list[bytes], seed: int, num_rows: int, found: _Lines
) -> None:
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        content = _content(line, seed)
        if content is None:
            found.problems[number] = "is damaged, or was edited"
            continue
        try:
            outcome = RowOutcome(**parse_json(content, f"{path} line {number}"))
            _check(outcome, found.outcomes, num_rows)
        except (TypeError, ValueError) as error:
            found.problems[number] = f"is not used: {error}"
            continue
        found.outcomes[outcome.index] = outcome


def _check(outcome: RowOutcome, known: Mapping[int, RowOutcome], num_rows: int) -> None:
    if not 0 <= outcome.index < num_rows:
        raise ValueError(f"row index {outcome.index} of {num_rows} rows")
    before = known.get(outcome.index)
    if before is not None and before.answer is not None:
        raise ValueError(f"row {outcome.index + 1} has an answer already")


def _lock(file: IO[bytes], path: pathlib.Path, kind: int = fcntl.LOCK_EX) -> None:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise RuntimeError(
            f"{path} is being written by another run; wait for it or use another workdir"
        ) from None


def _header(fingerprint: dict[str, Any]) -> bytes:
    return _line({"fingerprint": fingerprint}, 0)


def _line(content: dict[str, Any], seed: int) -> bytes:
    """A line of the journal; `seed` is the CRC-32 that the line's continues."""
    body = json.dumps(content, allow_nan=False).encode()
    return body[:-1] + f', "crc32": "{zlib.crc32(body, seed):08x}"}}\n'.encode()


def _content(line: bytes, seed: int) -> bytes | None:
    """The JSON object of a line without its checksum; None if the two do not fit."""
    suffix = _CHECKSUM.fullmatch(line, max(len(line) - 22, 0))
    if suffix is None:
        return None
    body = line[: suffix.start()] + b"}"
    return body if zlib.crc32(body, seed) == int(suffix[1], 16) else None


def _check_header(path: pathlib.Path, header: bytes, current: dict[str, Any]) -> None:
    """Raises ValueError if an intact first line has another fingerprint."""
    content = _content(header, 0)
    if content is None:
        return
    recorded = parse_json(content, f"{path} line 1").get("fingerprint")
    # What a value looks like after a round trip through JSON is what was recorded.
    current = json.loads(json.dumps(current))
    if isinstance(recorded, dict) and recorded != current:
        raise ValueError(
            f"{path} belongs to another run: {'; '.join(_differences(recorded, current))}. "
            f"Use another workdir, or delete the file to start again"
        )


def _foreign(path: pathlib.Path) -> ValueError:
    return ValueError(
        f"{path} is not a scoring journal of this run: its first line is damaged, or it was "
        "written by an earlier version, without checksums. Use another workdir, or delete the file"
    )


def _differences(recorded: dict[str, Any], current: dict[str, Any]) -> Iterator[str]:
    for name in sorted(recorded.keys() | current.keys()):
        before, now = recorded.get(name, "absent"), current.get(name, "absent")
        if before != now:
            yield f"{name} was {before!r} and is {now!r}"
