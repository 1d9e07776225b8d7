"""The loop alone, with a step that only takes time."""

import errno
import json
import pathlib
import time
from collections.abc import Iterator

import numpy as np
import pytest

from prumerge_jax.training.batches import GlobalBatch
from prumerge_jax.training.loop import LoopConfig, Outputs, TrainingError, train
from prumerge_jax.training.metrics import METRICS, MetricWriter
from prumerge_jax.training.step import StepMetrics
from prumerge_jax.training.workdir import StopFlag

SECONDS = 0.1
STEPS = 12


class Figure:
    """A scalar that is ready at some time; reading it waits until then."""

    def __init__(self, value: float, ready: float) -> None:
        self._value, self._ready = value, ready

    def is_ready(self) -> bool:
        return time.monotonic() >= self._ready

    def __float__(self) -> float:
        time.sleep(max(0.0, self._ready - time.monotonic()))
        return self._value


class Steps:
    """Steps of `SECONDS` each, one after the other; dispatched at once, or waited for."""

    def __init__(self, asynchronous: bool) -> None:
        self._asynchronous = asynchronous
        self._free = 0.0

    def __call__(self, state: int, frozen: object, batches: object, step: int):
        self._free = max(self._free, time.monotonic()) + SECONDS
        if not self._asynchronous:
            time.sleep(SECONDS)
        return state + 1, StepMetrics(*(Figure(v, self._free) for v in (1.0 + step, 0.5, 2.0)))


class Saved:
    """Checkpoints that remember what they got."""

    def __init__(self) -> None:
        self.positions: dict[int, dict] = {}

    def save(self, step: int, state: int, position: dict) -> None:
        self.positions[step] = position

    def steps(self) -> list[int]:
        return sorted(self.positions)

    def wait(self) -> None:
        pass


def batches() -> Iterator[GlobalBatch]:
    for index in range(STEPS):
        yield GlobalBatch([], 4 * (index + 1), {"samples": 4, "tokens": 100})


def writer(workdir: pathlib.Path) -> MetricWriter:
    return MetricWriter(workdir, start=0, total=STEPS, every=1, learning_rate=lambda step: 0.1)


def run(workdir: pathlib.Path, steps: Steps, metrics: MetricWriter, saved: Saved) -> int:
    config = LoopConfig(start=0, total_steps=STEPS, save_every=2)
    return train(steps, 0, {}, batches(), config, Outputs(saved, metrics), StopFlag())[1]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_speeds_around_saves_are_those_of_the_steps(
    tmp_path: pathlib.Path, asynchronous: bool
) -> None:
    metrics, saved = writer(tmp_path), Saved()
    assert run(tmp_path, Steps(asynchronous), metrics, saved) == STEPS
    metrics.close()
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [line["loss"] for line in lines] == list(range(1, STEPS + 1))
    seconds = [line["seconds_per_step"] for line in lines[1:]]
    assert min(seconds) > SECONDS / 4  # none was read together with the one before
    assert np.mean(seconds) > 0.7 * SECONDS
    assert saved.steps() == [2, 4, 6, 8, 10, 12]
    assert saved.positions[4] == {"samples": 16, "metrics": {}}


def test_a_record_that_cannot_be_written_ends_the_run_with_its_file_and_the_last_good_step(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics, saved = writer(tmp_path), Saved()
    written = metrics._lines.append

    def append(line: str) -> None:
        if json.loads(line)["step"] == 5:
            raise OSError(errno.ENOSPC, f"{tmp_path / METRICS} cannot be written")
        written(line)

    monkeypatch.setattr(metrics._lines, "append", append)
    with pytest.raises(TrainingError, match="metrics.jsonl cannot be written.*that of step 4"):
        run(tmp_path, Steps(asynchronous=False), metrics, saved)
    assert saved.steps() == [2, 4]


def test_data_that_ends_too_early_is_said(tmp_path: pathlib.Path) -> None:
    config = LoopConfig(start=0, total_steps=STEPS + 1, save_every=5)
    with pytest.raises(TrainingError, match=f"ended after step {STEPS} of {STEPS + 1}; .* step 10"):
        train(Steps(False), 0, {}, batches(), config, Outputs(Saved(), None), StopFlag())
