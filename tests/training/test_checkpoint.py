"""Checkpoints: exact, verified, set aside when damaged, refused when they do not fit."""

import json
import logging
import pathlib
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from prumerge_jax.sharding.mesh import make_mesh, replicated
from prumerge_jax.training import checkpoint
from prumerge_jax.training.checkpoint import CheckpointError, Checkpoints, load_trained
from prumerge_jax.training.optimizer import OptimizerConfig, make_optimizer
from prumerge_jax.training.step import TrainState

SHAPES = {"decoder.lora_a": (8, 4), "projector.bias": (6,)}
OPTIMIZER = make_optimizer(OptimizerConfig(), 10, dict.fromkeys(SHAPES, 1e-3))


def make_state(seed: int) -> TrainState:
    rng = np.random.default_rng(seed)
    trained = {
        path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in SHAPES.items()
    }
    optimizer = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 9, leaf.dtype),
        OPTIMIZER.init(trained),
    )
    return TrainState(trained, optimizer)


def target_of(state: TrainState, sizes: tuple[int, int, int] = (1, 1, 1)) -> TrainState:
    mesh = make_mesh(*sizes)
    matrix = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=matrix if leaf.ndim == 2 else replicated(mesh)
        ),
        state,
    )


def open_checkpoints(directory: pathlib.Path, keep: int = 3, **metadata: str) -> Checkpoints:
    return Checkpoints(directory, keep=keep, metadata={"base_weights": "abc"} | metadata)


def assert_same(got: TrainState, expected: TrainState) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Steps 1 to 3 of a run; copy before damaging them."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = open_checkpoints(directory)
    for step in (1, 2, 3):
        checkpoints.save(step, make_state(step), {"samples": 10 * step})
    checkpoints.close()
    return directory


@pytest.fixture
def copy(saved: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(saved, tmp_path / "checkpoints"))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 4, 2)])
def test_restores_the_newest_step_into_other_shards(
    saved: pathlib.Path, sizes: tuple[int, int, int]
) -> None:
    target = target_of(make_state(0), sizes)
    step, state, position = open_checkpoints(saved).restore(target)
    assert (step, position) == (3, {"samples": 30})
    assert_same(state, make_state(3))
    same = jax.tree.map(lambda leaf, wanted: leaf.sharding == wanted.sharding, state, target)
    assert all(jax.tree.leaves(same))


def test_adapters_alone_are_restored_without_the_optimizer(copy: pathlib.Path) -> None:
    step = copy / "step_00000003"
    weights = load_trained(step, target_of(make_state(0)).trained)
    jax.tree.map(np.testing.assert_array_equal, weights, make_state(3).trained)


def truncate(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file: pathlib.Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def kinds_of_files(step: pathlib.Path) -> list[str]:
    """One file of every kind, that is one per folder where names are random."""
    kinds: dict[tuple[pathlib.Path, str], pathlib.Path] = {}
    for file in sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size):
        name = "data" if file.parent.name == "d" else file.name
        kinds.setdefault((file.parent, name), file.relative_to(step))
    return [str(relative) for relative in kinds.values()]


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, pathlib.Path.unlink])
def test_every_damaged_file_is_named_and_the_step_before_is_used(
    saved: pathlib.Path,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[pathlib.Path], None],
) -> None:
    kinds = kinds_of_files(saved / "step_00000003")
    assert {"data.json", "metadata.json", "manifest.json"} < set(kinds)
    assert sum("/d/" in kind for kind in kinds) >= 2, kinds  # arrays of weights and optimizer
    target = target_of(make_state(0))
    for number, kind in enumerate(kinds):
        directory = pathlib.Path(shutil.copytree(saved, tmp_path / str(number)))
        damage(directory / "step_00000003" / kind)
        caplog.clear()
        step, state, position = open_checkpoints(directory).restore(target)
        assert (step, position) == (2, {"samples": 20}), kind
        assert_same(state, make_state(2))
        assert kind in caplog.text
        assert "DAMAGED" in caplog.text
        assert (directory / "step_00000003.damaged").is_dir()


def test_the_run_saves_again_where_a_step_was_set_aside(copy: pathlib.Path) -> None:
    truncate(copy / "step_00000003" / "data.json")
    checkpoints, target = open_checkpoints(copy), target_of(make_state(0))
    assert checkpoints.restore(target).step == 2
    checkpoints.save(3, make_state(33), {"samples": 30})
    checkpoints.close()
    assert_same(open_checkpoints(copy).restore(target).state, make_state(33))


def test_a_run_whose_steps_are_all_damaged_does_not_start_over(copy: pathlib.Path) -> None:
    for step in copy.iterdir():
        truncate(step / "data.json")
    with pytest.raises(CheckpointError, match=r"no intact checkpoint among the steps \[1, 2, 3\]"):
        open_checkpoints(copy).restore(target_of(make_state(0)))


def test_nothing_saved_is_nothing_restored(tmp_path: pathlib.Path) -> None:
    assert open_checkpoints(tmp_path / "new").restore(target_of(make_state(0))) is None


@pytest.mark.parametrize(
    ("path", "shape", "dtype", "message"),
    [
        ("projector.bias", (7,), jnp.float32, r"projector.bias is float32 \(6,\), .* \(7,\)"),
        ("projector.bias", (6,), jnp.bfloat16, "projector.bias is float32 .* expects bfloat16"),
        ("decoder.lora_a", None, None, r"holds \['decoder.lora_a'\], which this run does not"),
        ("vision.bias", (2,), jnp.float32, r"lacks \['vision.bias'\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    saved: pathlib.Path, path: str, shape: tuple | None, dtype: jnp.dtype, message: str
) -> None:
    target = target_of(make_state(0))
    trained = dict(target.trained)
    trained.pop(path, None)
    if shape is not None:
        trained[path] = jax.ShapeDtypeStruct(shape, dtype, sharding=replicated(make_mesh()))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoints(saved).restore(TrainState(trained, target.optimizer))


def test_other_base_weights_are_refused(saved: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match="base weights with hash abc, this run has xyz"):
        open_checkpoints(saved, base_weights="xyz").restore(target_of(make_state(0)))


def test_old_steps_go_once_a_newer_one_is_complete(tmp_path: pathlib.Path) -> None:
    checkpoints = open_checkpoints(tmp_path, keep=2)
    for step in (5, 10, 15):
        checkpoints.save(step, make_state(step), {"samples": step})
    checkpoints.close()
    assert checkpoints.steps() == [10, 15]
    metadata = json.loads((tmp_path / "step_00000015" / "metadata.json").read_text())
    assert metadata == {"step": 15, "base_weights": "abc"}


def test_what_a_killed_run_left_is_removed(copy: pathlib.Path) -> None:
    for name in ("step_00000004.incomplete", "step_00000004.incomplete.orbax-checkpoint-tmp"):
        (copy / name / "weights").mkdir(parents=True)
    checkpoints = open_checkpoints(copy)
    assert checkpoints.steps() == [1, 2, 3]
    assert sorted(p.name for p in copy.iterdir()) == [f"step_0000000{n}" for n in (1, 2, 3)]


@pytest.mark.parametrize(
    ("file", "shown"), [("/lib/orbax/checkpoint/_src/future.py", False), ("/lib/other.py", True)]
)
def test_a_failed_save_is_said_without_the_tracebacks_of_orbax(
    tmp_path: pathlib.Path, file: str, shown: bool
) -> None:
    open_checkpoints(tmp_path)
    error = OSError(28, "No space left on device")
    fields = ("absl", logging.ERROR, file, 1, "a thread raised", None)
    traceback = logging.LogRecord(*fields, (OSError, error, None))
    plain = logging.LogRecord(*fields, None)
    assert bool(logging.getLogger("absl").filter(traceback)) is shown
    assert logging.getLogger("absl").filter(plain)


def test_a_full_disk_leaves_old_steps_and_the_run_alive(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = open_checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {"samples": 1})
    checkpoints.wait()

    def full(directory: pathlib.Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_manifest", full)
        checkpoints.save(2, make_state(2), {"samples": 2})
        checkpoints.wait()
    assert "step_00000002 was NOT saved, older ones are intact" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    checkpoints.save(3, make_state(3), {"samples": 3})  # there is room again
    checkpoints.close()
    assert checkpoints.steps() == [1, 3]

    broken = open_checkpoints(tmp_path)
    monkeypatch.setattr(checkpoint, "write_manifest", full)
    broken.save(4, make_state(4), {"samples": 4})
    with pytest.raises(CheckpointError, match="last checkpoint was not saved: .*No space left"):
        broken.close()


def test_the_state_may_be_donated_while_it_is_being_saved(tmp_path: pathlib.Path) -> None:
    checkpoints = open_checkpoints(tmp_path)
    advance = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = jax.tree.map(jnp.array, make_state(1))
    checkpoints.save(1, state, {"samples": 1})
    for _ in range(20):
        state = advance(state)
    checkpoints.close()
    assert_same(open_checkpoints(tmp_path).restore(target_of(state)).state, make_state(1))
