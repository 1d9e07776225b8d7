"""The training loop, one for every stage."""

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Iterable

import jax

from prumerge_jax.sharding.processes import allgather_ints
from prumerge_jax.training.batches import Prepared
from prumerge_jax.training.checkpoint import Checkpoints
from prumerge_jax.training.metrics import Recorder
from prumerge_jax.training.parameters import Weights
from prumerge_jax.training.step import StepMetrics, TrainState, TrainStep
from prumerge_jax.training.stop import StopFlag

_logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """A run cannot go on; the message names the step and the last good checkpoint."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long the loop runs, and how often it saves and records.

    Attributes:
      total_steps: optimizer steps of the whole run.
      save_every: steps between two checkpoints; there is always one at the end.
      log_every: steps between two records of the metrics.
    """

    total_steps: int
    save_every: int
    log_every: int


def train(
    step_function: TrainStep,
    state: TrainState,
    frozen: Weights,
    feed: Iterable[Prepared],
    *,
    start: int,
    config: LoopConfig,
    learning_rate: Callable[[int], float],
    checkpoints: Checkpoints,
    workdir: str | os.PathLike[str],
    stop: StopFlag,
) -> tuple[TrainState, int]:
    """Runs until the last step or until asked to stop; either way the last step done is saved.

    A step's figures are read one step later, so that the devices never wait for the host. Nothing
    is saved before the loss and the gradient of every step so far were seen to be finite.

    Args:
      step_function: the compiled step.
      state: after `start` steps; donated.
      frozen: the weights that do not train.
      feed: the global batches from step `start` on.
      start: steps done already.
      config: length and cadence.
      learning_rate: the first group's rate at a step counted from 0, for the record.
      checkpoints: where steps are saved.
      workdir: where the metrics go.
      stop: looked at before every step, which is then the last; that of any process stops all.

    Returns:
      The state and the number of steps done.

    Raises:
      TrainingError: loss, gradient or attention is not finite, or the data ends too early.
    """
    total = config.total_steps
    if start == total:
        return state, start
    recorder = None
    if jax.process_index() == 0:
        recorder = Recorder(
            workdir, start=start, total=total, every=config.log_every, learning_rate=learning_rate
        )

    def record(step: int, metrics: StepMetrics, counts: dict[str, int]) -> None:
        loss, norm, targets = (float(value) for value in metrics)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingError(
                f"step {step}: loss {loss}, gradient norm {norm}; {_last_good(checkpoints)}"
            )
        if recorder is not None:
            recorder.add(step, loss=loss, targets=targets, gradient_norm=norm, counts=counts)

    done = start
    unread: tuple[int, StepMetrics, dict[str, int]] | None = None
    try:
        for prepared in feed:
            # Asked before the step, while the devices wait anyway; all processes hear the same.
            last = done + 1 == total or bool(allgather_ints([bool(stop)]).any())
            state, metrics = step_function(state, frozen, prepared.batches, done)
            done += 1
            if unread is not None:
                record(*unread)
            unread = done, metrics, prepared.counts
            if last or done % config.save_every == 0:
                record(*unread)
                unread = None
                checkpoints.save(done, state, {"samples": prepared.samples})
            if last:
                break
        else:
            raise TrainingError(
                f"the data ended after step {done} of {total}; {_last_good(checkpoints)}"
            )
    except FloatingPointError as error:
        raise TrainingError(f"step {done + 1}: {error}; {_last_good(checkpoints)}") from error
    finally:
        if recorder is not None:
            recorder.close()
    if done < total:
        reason = stop.reason or "another process"
        _logger.info("stopped by %s after step %d of %d", reason, done, total)
    return state, done


def _last_good(checkpoints: Checkpoints) -> str:
    checkpoints.wait()
    steps = checkpoints.steps()
    if not steps:
        return "no checkpoint was saved"
    return f"the last good checkpoint is that of step {steps[-1]}"
