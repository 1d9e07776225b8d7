"""Runs of the tiny miniature: resumed exactly, stopped gracefully, ended by NaN, exported."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import ml_collections
import numpy as np
import pytest

from configs.digits import contrastive, lora
from prumerge_jax.models import config_json
from prumerge_jax.store import model_directory as directories
from prumerge_jax.training.checkpoint import load_trained
from prumerge_jax.training.config import parse
from prumerge_jax.training.loop import TrainingError
from prumerge_jax.training.run import check, run
from prumerge_jax.training.workdir import StopFlag, WorkdirError

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

STEPS = 10
CONFIG_FILE = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({values!r}, convert_dict=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def first(folder: pathlib.Path) -> ml_collections.ConfigDict:
    """The tiny contrastive objective."""
    config = contrastive.get_config("tiny")
    config.data.directory = str(folder / "data")
    config.data.train_scenes = 32
    config.batch_size = 16
    config.steps = 2
    config.objective_options.curriculum = ((1, 1.0, 1),)
    return config


@pytest.fixture(scope="module")
def base(first: ml_collections.ConfigDict, folder: pathlib.Path) -> pathlib.Path:
    """The model that the first stage exports."""
    run(first, folder / "contrastive", StopFlag())
    return folder / "contrastive" / "model"


@pytest.fixture(scope="module")
def config(base: pathlib.Path, folder: pathlib.Path) -> ml_collections.ConfigDict:
    config = lora.get_config("tiny")
    config.data.directory = str(folder / "data")
    config.weights = str(base)
    config.data.train_scenes = 32
    config.max_length = 256
    config.batch_size = 8
    config.run.rows_per_shard = 4
    config.steps = STEPS
    config.run.save_every = 2
    config.run.keep = 20
    return config


@pytest.fixture(scope="module")
def straight(config: ml_collections.ConfigDict, folder: pathlib.Path) -> pathlib.Path:
    """A run without any interruption."""
    run(config, folder / "straight", StopFlag())
    return folder / "straight"


def trained_weights(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, step: int
) -> dict[str, np.ndarray]:
    setup = check(parse(config), {})
    shardings = setup.objective.module.shardings(setup.mesh)
    target = {
        path: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=shardings[path])
        for path, shape in setup.objective.trained().items()
    }
    weights = load_trained(workdir / "checkpoints" / f"step_{step:08d}", target)
    return {path: np.asarray(weight) for path, weight in weights.items()}


def saved_steps(workdir: pathlib.Path) -> list[int]:
    found = (workdir / "checkpoints").glob("step_" + "[0-9]" * 8)
    return sorted(int(path.name.removeprefix("step_")) for path in found)


def assert_same_record(workdir: pathlib.Path, straight: pathlib.Path) -> None:
    """A record of every three steps against one of every step."""
    ours, theirs = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (workdir, straight)
    )
    assert [line["step"] for line in ours] == [3, 6, 9, STEPS]
    assert [line["step"] for line in theirs] == list(range(1, STEPS + 1))
    for line in ours:
        steps = theirs[(line["step"] - 1) // 3 * 3 : line["step"]]
        targets = [step["target_tokens"] for step in steps]
        losses = [step["loss"] * step["target_tokens"] for step in steps]
        assert line["target_tokens"] == sum(targets)
        assert line["loss"] == pytest.approx(sum(losses) / sum(targets), rel=1e-12)
        assert line["samples"] == sum(step["samples"] for step in steps)
        for name in ("gradient_norm", "learning_rate"):
            assert line[name] == steps[-1][name]


def interrupt(
    config: ml_collections.ConfigDict, workdir: pathlib.Path, number: int, after: int
) -> int:
    """Runs train.py, sends it a signal once step `after` is saved, returns its exit status."""
    file = workdir.parent / "config.py"
    file.write_text(CONFIG_FILE.format(values=config.to_dict()))
    command = [sys.executable, "train.py", f"--config={file}", f"--workdir={workdir}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE) as process:
        while process.poll() is None and after not in saved_steps(workdir):
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate()
    assert not (workdir / "model").exists(), "the run had ended before the signal"
    assert process.returncode in (0, -number), errors.decode()
    return process.returncode


def test_the_contrastive_objective_leaves_its_tower_sharpened(
    first: ml_collections.ConfigDict, base: pathlib.Path
) -> None:
    tower = {
        path: weight
        for path, weight in trained_weights(first, base.parent, 2).items()
        if path.startswith("vision.")
    }
    factors = dict.fromkeys(tower, 1.0) | {
        f"vision.last.q_proj.{name}": first.objective_options.cls_attention_gain
        for name in ("kernel", "bias")
    }
    assert first.objective_options.cls_attention_gain != 1
    for path, weight in tower.items():
        np.testing.assert_array_equal(
            directories.read_array(base, path), weight * np.float32(factors[path]), path
        )


def test_a_terminated_and_then_killed_run_ends_bit_identical(
    config: ml_collections.ConfigDict, straight: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    workdir = tmp_path / "interrupted"
    config = config.copy_and_resolve_references()
    config.run.log_every = 3  # its sums are carried over the interruptions
    assert interrupt(config, workdir, signal.SIGTERM, after=2) == 0
    stopped = saved_steps(workdir)[-1]
    assert 2 <= stopped < STEPS - 2
    assert interrupt(config, workdir, signal.SIGKILL, after=stopped // 2 * 2 + 2) == -signal.SIGKILL
    assert saved_steps(workdir)[-1] < STEPS
    run(config, workdir, StopFlag())
    ours, theirs = (trained_weights(config, w, STEPS) for w in (workdir, straight))
    for path, weight in theirs.items():
        assert ours[path].tobytes() == weight.tobytes(), path
    assert_same_record(workdir, straight)
    leftovers = [p.name for p in (workdir / "checkpoints").iterdir() if "incomplete" in p.name]
    assert not leftovers


def test_frozen_weights_on_every_data_shard_train_the_same(
    config: ml_collections.ConfigDict, straight: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = config.copy_and_resolve_references()
    config.run.frozen = "replicated"
    run(config, tmp_path / "run", StopFlag())
    records = []
    for workdir, frozen in ((tmp_path / "run", "replicated"), (straight, "sharded")):
        assert json.loads((workdir / "execution.json").read_text())["frozen"] == frozen
        directories.verify(workdir / "model")
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        records.append([json.loads(line)["loss"] for line in lines])
    np.testing.assert_allclose(*records, rtol=1e-5)


def test_a_finished_run_leaves_its_base_as_it_was_and_adapters_that_stand_alone(
    config: ml_collections.ConfigDict, straight: pathlib.Path, base: pathlib.Path
) -> None:
    model = straight / "model"
    directories.verify(model)
    adapter = config_json.read_adapter(model)
    assert (adapter.rank, adapter.alpha) == (config.adapter.rank, config.adapter.alpha)
    shapes = directories.read_manifest(model).arrays
    target = {p: jax.ShapeDtypeStruct(a.shape, a.dtype) for p, a in shapes.items()}
    whole = directories.load_arrays(model, target)
    trained = trained_weights(config, straight, STEPS)
    of_base = directories.read_manifest(base).arrays
    untouched = {
        path: directories.load_array(base, path, target[path])
        for path in of_base
        if path not in trained
    }
    assert set(whole) == set(trained) | set(untouched)
    for path, weight in (untouched | trained).items():
        assert np.asarray(whole[path]).tobytes() == np.asarray(weight).tobytes(), path
    assert (model / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    for path in trained:
        if path in of_base:
            before = directories.load_array(base, path, target[path])
            assert np.abs(whole[path] - before).max() > 0, path


def test_a_stopped_run_saves_its_step_and_can_be_resumed(
    config: ml_collections.ConfigDict, straight: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    stop = StopFlag()
    stop.request("a test")
    run(config, tmp_path / "run", stop)
    assert saved_steps(tmp_path / "run") == [1]
    assert not (tmp_path / "run" / "model").exists()
    first = (straight / "metrics.jsonl").read_text().splitlines()[0]
    again = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0]
    assert json.loads(again)["loss"] == json.loads(first)["loss"]


def test_nan_ends_the_run_and_is_never_saved(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path
) -> None:
    exploding = config.copy_and_resolve_references()
    exploding.learning_rates = (("decoder.*.lora_?", 1e20), ("projector.*", 1e20))
    with pytest.raises(TrainingError, match=r"step \d+: loss .*nan.*") as error:
        run(exploding, tmp_path / "run", StopFlag())
    failed = int(str(error.value).split(":")[0].removeprefix("step "))
    saved = saved_steps(tmp_path / "run")
    assert all(step < failed for step in saved)
    expected = f"checkpoint is that of step {saved[-1]}" if saved else "no checkpoint was saved"
    assert expected in str(error.value)
    assert not (tmp_path / "run" / "model").exists()


def test_a_finished_run_is_not_changed_and_another_configuration_is_refused(
    config: ml_collections.ConfigDict, straight: pathlib.Path
) -> None:
    before = (straight / "metrics.jsonl").read_bytes()
    run(config, straight, StopFlag())
    assert (straight / "metrics.jsonl").read_bytes() == before
    other = config.copy_and_resolve_references()
    other.seed = 7
    with pytest.raises(WorkdirError, match="seed: 0 before, 7 now"):
        run(other, straight, StopFlag())


def test_weights_of_other_sizes_are_refused_before_anything_is_written(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path
) -> None:
    other = config.copy_and_resolve_references()
    other.model.text.num_layers = 4
    with pytest.raises(directories.DirectoryError, match="config.model says"):
        run(other, tmp_path / "run", StopFlag())
    assert not (tmp_path / "run").exists()
