"""The training loop, one for every objective."""

import dataclasses
import logging
import math
import time
from collections.abc import Iterable

from prumerge_jax.sharding.processes import allgather_ints
from prumerge_jax.training.batches import GlobalBatch
from prumerge_jax.training.checkpoint import Checkpoints
from prumerge_jax.training.metrics import MetricWriter, StepRecord
from prumerge_jax.training.step import StepMetrics, TrainState, TrainStep
from prumerge_jax.training.weights import Weights
from prumerge_jax.training.workdir import StopFlag

_logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """A run cannot continue; the message names the step and the last good checkpoint."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How far the loop runs, and how often it saves.

    Attributes:
      start: number of steps done already.
      total_steps: number of optimizer steps of the complete run.
      save_every: steps between two checkpoints; there is always one at the end.
    """

    start: int
    total_steps: int
    save_every: int


@dataclasses.dataclass(frozen=True)
class Outputs:
    """Where a run is saved and recorded.

    Attributes:
      checkpoints: gets the steps.
      metrics: gets the figures; None on all processes but the first.
    """

    checkpoints: Checkpoints
    metrics: MetricWriter | None


def train(
    step_function: TrainStep,
    state: TrainState,
    frozen: Weights,
    batches: Iterable[GlobalBatch],
    config: LoopConfig,
    outputs: Outputs,
    stop: StopFlag,
) -> tuple[TrainState, int]:
    """Runs until the last step or until asked to stop; either way the last step done is saved.

    Nothing is saved before the loss and the gradient of every step so far were seen to be finite.

    Args:
      step_function: the jitted step.
      state: after `config.start` steps; donated.
      frozen: the weights that do not train.
      batches: the global batches from step `config.start` on.
      config: length and cadence.
      outputs: where steps are saved and recorded.
      stop: checked before every step; if set on any process, all stop after that step.

    Returns:
      The state and the number of steps done.

    Raises:
      TrainingError: loss, gradient or attention is not finite, the data ends too early, or the
        record cannot be written.
    """
    done, total = config.start, config.total_steps
    if done == total:
        return state, done
    figures = _LaggedFigures(outputs)
    try:
        for batch in batches:
            figures.look()
            # Checked before the step, while the devices wait anyway; all processes get one answer.
            last = done + 1 == total or bool(allgather_ints([bool(stop)]).any())
            state, metrics = step_function(state, frozen, batch.batches, done)
            done += 1
            figures.push(done, metrics, batch.counts)
            if last or done % config.save_every == 0:
                figures.flush()
                outputs.checkpoints.save(done, state, _position(batch, outputs))
            if last:
                break
        else:
            raise TrainingError(
                f"the data ended after step {done} of {total}; {_last_good(outputs.checkpoints)}"
            )
    except (FloatingPointError, OSError) as error:
        raise TrainingError(
            f"step {done + 1}: {error}; {_last_good(outputs.checkpoints)}"
        ) from error
    if done < total:
        reason = stop.reason or "another process"
        _logger.info("stopped by %s after step %d of %d", reason, done, total)
    return state, done


class _LaggedFigures:
    """Reads the figures of a step one step later, so that the devices never wait for the host."""

    def __init__(self, outputs: Outputs) -> None:
        self._outputs = outputs
        self._unread: tuple[int, StepMetrics, dict[str, int]] | None = None
        self._ready_at: float | None = None

    def push(self, step: int, metrics: StepMetrics, counts: dict[str, int]) -> None:
        """Takes the figures of the step that was just dispatched, and records the one before."""
        self.flush()
        self._unread = step, metrics, counts
        self.look()

    def look(self) -> None:
        """Notes the time if the figures are ready; on CPUs they may be at once."""
        if self._unread is not None and self._ready_at is None and self._unread[1].loss.is_ready():
            self._ready_at = time.monotonic()

    def flush(self) -> None:
        """Waits for the figures that are still unread, and records them.

        Raises:
          TrainingError: they are not finite.
        """
        if self._unread is None:
            return
        step, metrics, counts = self._unread
        loss, norm, targets = (float(value) for value in metrics)
        finished = time.monotonic() if self._ready_at is None else self._ready_at
        self._unread = self._ready_at = None
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"step {step}: loss {loss}, gradient norm {norm}; "
                f"{_last_good(self._outputs.checkpoints)}"
            )
        if self._outputs.metrics is not None:
            self._outputs.metrics.add(StepRecord(step, loss, norm, targets, counts, finished))


def _position(batch: GlobalBatch, outputs: Outputs) -> dict[str, object]:
    """State of the run: samples used, and the figures that are not yet recorded."""
    totals = {} if outputs.metrics is None else outputs.metrics.totals
    return {"samples": batch.samples, "metrics": totals}


def _last_good(checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    steps = checkpoints.steps()
    if not steps:
        return "no checkpoint was saved"
    return f"the last good checkpoint is that of step {steps[-1]}"
