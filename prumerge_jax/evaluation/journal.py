"""The scoring journal: a run that is killed at any moment goes on where it was.

One JSON-lines file. Its first line is the fingerprint of the run; then one line per finished row,
appended and fsynced a batch at a time. Opening it locks it, cuts off a line that a crash left
incomplete and refuses another run's fingerprint. The answers file is written from it at the end,
in input order, by rename: the same bytes whether or not the run was interrupted.
"""

import dataclasses
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from prumerge_jax.evaluation import jsonfiles
from prumerge_jax.evaluation.answers import Fingerprint

_START = b'{"fingerprint": '


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one row of the question file.

    Attributes:
      index: Place in the question file, from 0. (Question ids repeat in some benchmarks.)
      question_id: For the error report.
      answer: The line of the answers file, or None if the row failed.
      error: Why the row failed, or None.
      measured: Numbers to summarise over the run, such as the count of visual tokens.
    """

    index: int
    question_id: int | str
    answer: Mapping[str, Any] | None = None
    error: str | None = None
    measured: Mapping[str, int | float] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.answer is None) == (self.error is None):
            raise ValueError(f"row {self.index + 1} needs either an answer or an error")


class Journal:
    """The open journal of a scoring run; a context manager, and the file's only writer.

    A failed row is tried again by the next run, because its cause (a missing image, say) may have
    been mended; an answered row is not.
    """

    def __init__(self, path: pathlib.Path, fingerprint: Fingerprint, num_rows: int) -> None:
        """Opens or starts the journal.

        Args:
          path: The journal file; its folder must exist.
          fingerprint: Flat mapping of all that determines the answers: hashes of weights and
            prompts, reduction, decoding settings, code version.
          num_rows: Number of rows of the question file.

        Raises:
          RuntimeError: Another process writes this journal.
          ValueError: The journal belongs to a run of another fingerprint, or is damaged elsewhere
            than in its last line. It is left as it is.
        """
        self.path = path
        self._num_rows = num_rows
        self._outcomes: dict[int, Outcome] = {}
        self._file = path.open("a+b", buffering=0)
        try:
            self._lock()
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
    def outcomes(self) -> Mapping[int, Outcome]:
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

    def append(self, outcomes: Sequence[Outcome]) -> None:
        """Makes a batch durable: when this returns, a crash no longer loses it.

        Raises:
          ValueError: A row is out of range or has an answer already. Nothing is written.
          OSError: The batch could not be written; the journal stays as it was before.
        """
        batch: dict[int, Outcome] = {}
        for outcome in outcomes:
            self._check(outcome)
            if outcome.index in batch:
                raise ValueError(f"row {outcome.index + 1} is twice in one batch")
            batch[outcome.index] = outcome
        lines = "".join(jsonfiles.dump_line(dataclasses.asdict(outcome)) for outcome in outcomes)
        self._write(lines.encode())
        self._outcomes |= batch

    def write_results(self, folder: pathlib.Path) -> None:
        """Writes answers.jsonl and errors.jsonl, each whole or not at all, in input order.

        Raises:
          ValueError: A row has neither an answer nor an error yet.
        """
        untried = [index for index in range(self._num_rows) if index not in self._outcomes]
        if untried:
            raise ValueError(
                f"{self.path}: {len(untried)} of {self._num_rows} rows are not scored yet, the "
                f"first is row {untried[0] + 1}"
            )
        ordered = [self._outcomes[index] for index in range(self._num_rows)]
        answers = [dict(outcome.answer) for outcome in ordered if outcome.answer is not None]
        errors = [
            {
                "row": outcome.index + 1,
                "question_id": outcome.question_id,
                "error": outcome.error,
            }
            for outcome in ordered
            if outcome.error is not None
        ]
        for name, rows in (("answers.jsonl", answers), ("errors.jsonl", errors)):
            jsonfiles.replace_file(folder / name, "".join(map(jsonfiles.dump_line, rows)))

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"{self.path} is being written by another run; wait for it or use another workdir"
            ) from None

    def _recover(self, fingerprint: dict[str, Any]) -> None:
        data = self.path.read_bytes()
        if not data.startswith(_START) and not _START.startswith(data):
            raise ValueError(f"{self.path} is no scoring journal; use another workdir")
        whole = data[: data.rfind(b"\n") + 1]
        if whole:
            self._read(whole, fingerprint)
        # Only now that the file is known to be this run's journal may it be changed.
        if len(whole) < len(data):
            self._truncate(len(whole))
        if not whole:
            self._write(jsonfiles.dump_line({"fingerprint": fingerprint}).encode())
            jsonfiles.sync_directory(self.path.parent)

    def _read(self, data: bytes, fingerprint: dict[str, Any]) -> None:
        header, *rows = jsonfiles.parse_jsonl(data, str(self.path))
        recorded = jsonfiles.field(header, "fingerprint", dict, f"{self.path} row 1")
        _check_fingerprint(self.path, recorded, fingerprint)
        for number, row in enumerate(rows, start=2):
            try:
                outcome = Outcome(**row)
                self._check(outcome)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{self.path} row {number} is damaged: {error}") from error
            self._outcomes[outcome.index] = outcome

    def _check(self, outcome: Outcome) -> None:
        if not 0 <= outcome.index < self._num_rows:
            raise ValueError(f"row index {outcome.index} of {self._num_rows} rows")
        known = self._outcomes.get(outcome.index)
        if known is not None and known.answer is not None:
            raise ValueError(f"row {outcome.index + 1} has an answer already")

    def _write(self, data: bytes) -> None:
        end = os.fstat(self._file.fileno()).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._file.fileno(), view) :]
            os.fsync(self._file.fileno())
        except OSError:
            # A part of a line would swallow the next one appended to it.
            self._truncate(end)
            raise

    def _truncate(self, size: int) -> None:
        os.ftruncate(self._file.fileno(), size)
        os.fsync(self._file.fileno())


def _check_fingerprint(
    path: pathlib.Path, recorded: dict[str, Any], current: dict[str, Any]
) -> None:
    # What a value looks like after a round trip through JSON is what was recorded.
    current = json.loads(json.dumps(current))
    if recorded != current:
        raise ValueError(
            f"{path} belongs to another run: {'; '.join(_differences(recorded, current))}. "
            f"Use another workdir, or delete the file to start again"
        )


def _differences(recorded: dict[str, Any], current: dict[str, Any]) -> Iterator[str]:
    for name in sorted(recorded.keys() | current.keys()):
        before, now = recorded.get(name, "absent"), current.get(name, "absent")
        if before != now:
            yield f"{name} was {before!r} and is {now!r}"
