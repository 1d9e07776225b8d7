"""The record of a run."""

import json
import pathlib

import pytest

from prumerge_jax.training.metrics import METRICS, Recorder


def record_steps(workdir: pathlib.Path, steps: range, **options: int) -> None:
    recorder = Recorder(workdir, learning_rate=lambda step: 0.1 * step, **options)
    for step in steps:
        counts = {"samples": 4, "images": 2, "visual_tokens": 10, "tokens": 30, "positions": 40}
        recorder.add(step, loss=float(step), targets=step, gradient_norm=0.5, counts=counts)
    recorder.close()


def read_records(workdir: pathlib.Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (workdir / METRICS).read_text().splitlines()]


def test_records_are_means_over_targets_and_images(tmp_path: pathlib.Path) -> None:
    record_steps(tmp_path, range(1, 8), start=0, total=7, every=3)
    records = read_records(tmp_path)
    assert [record["step"] for record in records] == [3, 6, 7]
    # The first step, which compiles, is left out of the first record.
    assert records[0]["loss"] == pytest.approx((2 * 2 + 3 * 3) / 5)
    assert records[1]["loss"] == pytest.approx((16 + 25 + 36) / 15)
    assert records[1]["target_tokens"] == 15
    assert records[1]["visual_tokens_mean"] == 5
    assert records[1]["token_efficiency"] == 0.75
    assert records[1]["learning_rate"] == pytest.approx(0.5)
    assert records[1]["samples_per_second"] == pytest.approx(2 * records[1]["images_per_second"])
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path: pathlib.Path) -> None:
    record_steps(tmp_path, range(1, 7), start=0, total=9, every=1)
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"step": 7, "lo')  # torn by a kill
    record_steps(tmp_path, range(5, 10), start=4, total=9, every=1)
    assert [record["step"] for record in read_records(tmp_path)] == list(range(1, 10))
