"""The record of a run."""

import errno
import json
import pathlib

import pytest

from prumerge_jax.training.metrics import METRICS, MetricWriter, StepRecord

COUNTS = {"samples": 4, "images": 2, "visual_tokens": 10, "tokens": 30, "positions": 40}


def record_steps(workdir: pathlib.Path, steps: range, **options: object) -> dict[str, float]:
    """Records steps of a second each; returns the sums that were not written."""
    writer = MetricWriter(workdir, learning_rate=lambda step: 0.1 * step, **options)
    for step in steps:
        writer.add(StepRecord(step, float(step), 0.5, step, COUNTS, finished=float(step)))
    writer.close()
    return writer.totals


def read_records(workdir: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / METRICS).read_text().splitlines()]


def test_records_are_means_over_targets_and_images(tmp_path: pathlib.Path) -> None:
    record_steps(tmp_path, range(1, 8), start=0, total=7, every=3)
    records = read_records(tmp_path)
    assert [record["step"] for record in records] == [3, 6, 7]
    assert records[0]["loss"] == pytest.approx((1 * 1 + 2 * 2 + 3 * 3) / 6)
    assert records[1]["loss"] == pytest.approx((16 + 25 + 36) / 15)
    assert records[1]["target_tokens"] == 15
    assert records[1]["visual_tokens_mean"] == 5
    assert records[1]["token_efficiency"] == 0.75
    assert records[1]["learning_rate"] == pytest.approx(0.5)
    assert records[1]["samples_per_second"] == pytest.approx(2 * records[1]["images_per_second"])
    # The first step, which compiles, is left out of the speeds alone.
    assert [record["seconds_per_step"] for record in records] == [1, 1, 1]
    assert [record["tokens_per_second"] for record in records] == [30, 30, 30]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path: pathlib.Path) -> None:
    record_steps(tmp_path, range(1, 7), start=0, total=9, every=1)
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"step": 7, "lo')  # torn by a kill
    record_steps(tmp_path, range(5, 10), start=4, total=9, every=1)
    assert [record["step"] for record in read_records(tmp_path)] == list(range(1, 10))


def without_speeds(records: list[dict[str, float]]) -> list[dict[str, float]]:
    return [
        {k: v for k, v in record.items() if not k.endswith(("_second", "_step"))}
        for record in records
    ]


@pytest.mark.parametrize("stopped", [1, 2, 3, 4, 5])
def test_a_run_that_stops_between_two_records_writes_those_of_a_straight_one(
    tmp_path: pathlib.Path, stopped: int
) -> None:
    record_steps(tmp_path, range(1, 9), start=0, total=8, every=3)
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    totals = record_steps(resumed, range(1, stopped + 1), start=0, total=8, every=3)
    totals = json.loads(json.dumps(totals))  # as a checkpoint holds them
    record_steps(resumed, range(stopped + 1, 9), start=stopped, total=8, every=3, totals=totals)
    assert without_speeds(read_records(resumed)) == without_speeds(read_records(tmp_path))


def test_a_full_events_file_is_said_once_and_never_stops_the_record(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: object, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = MetricWriter(tmp_path, start=0, total=40, every=1, learning_rate=lambda step: 0.1)
    for step in range(1, 41):  # more than any queue of events holds
        if step == 3:
            monkeypatch.setattr("tensorboardX.record_writer.RecordWriter.write", full)
        writer.add(StepRecord(step, 1.0, 0.5, 1, COUNTS, finished=float(step)))
    writer.close()
    assert [record["step"] for record in read_records(tmp_path)] == list(range(1, 41))
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert len(errors) == 1
    assert "tensorboard cannot be written" in errors[0]
    assert "the run continues without it" in errors[0]


def test_no_part_of_a_line_is_left_where_the_disk_is_full(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = MetricWriter(tmp_path, start=0, total=4, every=1, learning_rate=lambda step: 0.1)
    writer.add(StepRecord(1, 1.0, 0.5, 1, COUNTS, finished=1.0))

    class Full:
        """Takes ten bytes more."""

        def __init__(self, file: object) -> None:
            self.fileno, self.truncate, self.close = file.fileno, file.truncate, file.close
            self.write = lambda content: file.write(content[:10])

    monkeypatch.setattr(writer._lines, "_file", Full(writer._lines._file))
    with pytest.raises(OSError, match=r"metrics.jsonl cannot be written: no space left"):
        writer.add(StepRecord(2, 1.0, 0.5, 1, COUNTS, finished=2.0))
    writer.close()
    assert [record["step"] for record in read_records(tmp_path)] == [1]
