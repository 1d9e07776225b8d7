"""The record of a run: a progress bar, `metrics.jsonl` and TensorBoard event files."""

import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import tqdm
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from prumerge_jax.store.atomic import write_atomically

_logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
# Fields of a record that the progress bar shows, and their labels.
_SHOWN = {
    "loss": "loss",
    "tokens_per_second": "tokens/s",
    "images_per_second": "images/s",
    "visual_tokens_mean": "visual tokens",
}
_RATES = ("samples", "images", "tokens")


class StepRecord(NamedTuple):
    """Figures of one finished step.

    Attributes:
      step: counted from 1.
      loss: mean over the targets.
      gradient_norm: global norm before clipping.
      targets: number of target tokens.
      counts: see `batches.GlobalBatch`.
      finished: time at which the step's figures were ready, in seconds of `time.monotonic`.
    """

    step: int
    loss: float
    gradient_norm: float
    targets: float
    counts: Mapping[str, int]
    finished: float


class MetricWriter:
    """Adds up the figures of the steps and writes their totals every few steps.

    A resumed run continues in the same files: lines of steps that a killed run made after its last
    checkpoint are dropped, since they will be rewritten. Its lines are those of a run that was
    never interrupted, but for the speeds: the sums since the last line are part of a checkpoint.

    Args:
      workdir: gets `metrics.jsonl` and the folder `tensorboard`.
      start: number of steps done already.
      total: number of steps of the complete run.
      every: steps between two records.
      learning_rate: the first parameter group's rate at a step counted from 0.
      totals: what `totals` was after step `start`.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        start: int,
        total: int,
        every: int,
        learning_rate: Callable[[int], float],
        totals: Mapping[str, float] | None = None,
    ) -> None:
        self._every = every
        self._total = total
        self._learning_rate = learning_rate
        path = pathlib.Path(workdir) / METRICS
        _drop_after(path, start)
        self._lines = _LineFile(path)
        self._events = _EventFile(pathlib.Path(workdir) / TENSORBOARD, start)
        # On a terminal only; elsewhere the records are logged as lines.
        self._bar = tqdm.tqdm(total=total, initial=start, unit="step", disable=None)
        self._sums = dict(totals or {})
        self._clock = _Clock()

    @property
    def totals(self) -> dict[str, float]:
        """Sums over the steps since the last record, JSON values."""
        return dict(self._sums)

    def add(self, record: StepRecord) -> None:
        """Adds the figures of a finished step.

        Raises:
          OSError: `metrics.jsonl` cannot be written; no part of a line is left in it.
        """
        own = {"targets": record.targets, "loss": record.loss * record.targets}
        for name, value in {**record.counts, **own}.items():
            self._sums[name] = self._sums.get(name, 0) + value
        self._clock.add(record)
        if record.step % self._every == 0 or record.step == self._total:
            self._write(record.step, record.gradient_norm)
            self._sums = {}
        self._bar.update(1)

    def close(self) -> None:
        """Closes all outputs."""
        self._bar.close()
        self._events.close()
        self._lines.close()

    def _write(self, step: int, gradient_norm: float) -> None:
        totals = dict(self._sums)
        targets = totals.pop("targets")
        record = {
            "step": step,
            "loss": totals.pop("loss") / max(targets, 1),
            "gradient_norm": gradient_norm,
            "learning_rate": float(self._learning_rate(step - 1)),
            "target_tokens": targets,
            **totals,
        }
        if totals.get("images") and "visual_tokens" in totals:
            record["visual_tokens_mean"] = record.pop("visual_tokens") / totals["images"]
        if totals.get("positions"):
            record["token_efficiency"] = totals["tokens"] / record.pop("positions")
        record |= self._clock.rates()
        self._lines.append(json.dumps(record))
        self._events.add(step, record)
        shown = {label: f"{record[name]:.4g}" for name, label in _SHOWN.items() if name in record}
        self._bar.set_postfix(shown)
        if self._bar.disable:
            _logger.info("step %d: %s", step, ", ".join(f"{k} {v}" for k, v in shown.items()))


class _Clock:
    """Speeds between two records; the first step after a start, which compiles, is left out."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._now = 0.0
        self._steps = 0
        self._sums = dict.fromkeys(_RATES, 0)

    def add(self, record: StepRecord) -> None:
        if self._since is None:
            self._since = record.finished
            return
        self._now = record.finished
        self._steps += 1
        for name in _RATES:
            self._sums[name] += record.counts.get(name, 0)

    def rates(self) -> dict[str, float]:
        """Seconds per step and samples, images, tokens per second since the last call."""
        if self._since is None or not self._steps:
            return {}
        seconds = max(self._now - self._since, 1e-9)
        rates = {f"{name}_per_second": sum / seconds for name, sum in self._sums.items() if sum}
        rates = {"seconds_per_step": seconds / self._steps, **rates}
        self._since, self._steps, self._sums = self._now, 0, dict.fromkeys(_RATES, 0)
        return rates


class _LineFile:
    """A file of lines to which a line is appended completely or not at all."""

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115, closed in close()

    def append(self, line: str) -> None:
        size = os.fstat(self._file.fileno()).st_size
        content = line.encode() + b"\n"
        try:
            if self._file.write(content) != len(content):
                raise OSError("no space left for a complete line")
        except OSError as error:
            self._file.truncate(size)
            raise OSError(f"{self._path} cannot be written: {error}") from error

    def close(self) -> None:
        self._file.close()


class _EventFile:
    """TensorBoard events, written in the caller's thread; a failure ends them, not the run.

    `SummaryWriter` writes in a separate thread: when that dies of a full disk, its queue fills up
    and the caller waits for ever.
    """

    def __init__(self, folder: pathlib.Path, start: int) -> None:
        self._folder = folder
        self._writer: EventsWriter | None = None
        try:
            folder.mkdir(exist_ok=True)
            self._writer = EventsWriter(os.fspath(folder / "events"))
            # Hides what a killed run wrote after its last checkpoint.
            started = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(step=start + 1, session_log=started))
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def add(self, step: int, record: Mapping[str, float]) -> None:
        if self._writer is None:
            return
        try:
            for name, value in record.items():
                self._writer.write_event(Event(step=step, summary=scalar(name, value)))
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._writer = None
        _logger.error(
            "%s cannot be written (%s); the run continues without it, %s is complete",
            self._folder, error, METRICS,
        )  # fmt: skip


def _drop_after(path: pathlib.Path, step: int) -> None:
    """Keeps the records up to `step`; a torn last line and damaged ones are dropped."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            _logger.warning("%s: dropping a torn or damaged line", path)
    write_atomically(path, b"".join(kept))
