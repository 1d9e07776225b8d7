"""What a run tells: a progress bar, `metrics.jsonl` and TensorBoard event files."""

import json
import logging
import os
import pathlib
import time
from collections.abc import Callable, Mapping

import tqdm
from tensorboardX import SummaryWriter

_logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
# What the progress bar shows of a record, and how it calls it.
_SHOWN = {
    "loss": "loss",
    "tokens_per_second": "tokens/s",
    "images_per_second": "images/s",
    "visual_tokens_mean": "visual tokens",
}


class Recorder:
    """Collects the figures of the steps and writes their totals every few steps.

    A resumed run goes on in the same files: lines of steps that a killed run made after its last
    checkpoint are dropped, since they will come again.

    Args:
      workdir: gets `metrics.jsonl` and the folder `tensorboard`.
      start: steps done already.
      total: steps of the whole run.
      every: steps between two records.
      learning_rate: the first parameter group's rate at a step counted from 0.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        start: int,
        total: int,
        every: int,
        learning_rate: Callable[[int], float],
    ) -> None:
        self._every = every
        self._total = total
        self._learning_rate = learning_rate
        self._path = pathlib.Path(workdir) / METRICS
        _drop_after(self._path, start)
        self._file = open(self._path, "a", buffering=1)  # noqa: SIM115, closed in close()
        folder = os.fspath(pathlib.Path(workdir) / "tensorboard")
        self._board = SummaryWriter(folder, purge_step=start + 1)
        # On a terminal only; elsewhere the records are logged as lines.
        self._bar = tqdm.tqdm(total=total, initial=start, unit="step", disable=None)
        self._totals: dict[str, float] = {}
        self._since: float | None = None
        self._steps = 0

    def add(
        self,
        step: int,
        *,
        loss: float,
        targets: float,
        gradient_norm: float,
        counts: Mapping[str, int],
    ) -> None:
        """Adds the figures of a finished step; `step` counts from 1."""
        totals = self._totals
        for name, value in {**counts, "targets": targets, "loss": loss * targets}.items():
            totals[name] = totals.get(name, 0) + value
        self._steps += 1
        if step % self._every == 0 or step == self._total:
            self._write(step, gradient_norm)
            self._totals, self._steps = {}, 0
        self._bar.update(1)
        if self._since is None:
            # The clock starts after the first step, which compiles.
            self._since, self._totals, self._steps = time.monotonic(), {}, 0

    def close(self) -> None:
        """Flushes and closes all outputs."""
        self._bar.close()
        self._board.close()
        self._file.close()

    def _write(self, step: int, gradient_norm: float) -> None:
        totals = self._totals
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
        record |= self._rates()
        self._file.write(json.dumps(record) + "\n")
        for name, value in record.items():
            self._board.add_scalar(name, value, step)
        shown = {label: f"{record[name]:.4g}" for name, label in _SHOWN.items() if name in record}
        self._bar.set_postfix(shown)
        if self._bar.disable:
            _logger.info("step %d: %s", step, ", ".join(f"{k} {v}" for k, v in shown.items()))

    def _rates(self) -> dict[str, float]:
        if self._since is None:
            return {}
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        names = [name for name in ("samples", "images", "tokens") if self._totals.get(name)]
        rates = {f"{name}_per_second": self._totals[name] / seconds for name in names}
        return {"seconds_per_step": seconds / self._steps, **rates}


def _drop_after(path: pathlib.Path, step: int) -> None:
    """Keeps the records up to `step`; a torn last line goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            _logger.warning("%s: dropping a torn line", path)
    rewritten = path.with_suffix(".rewritten")
    rewritten.write_text("".join(kept))
    rewritten.replace(path)
