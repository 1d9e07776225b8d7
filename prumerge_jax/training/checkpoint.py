"""Checkpoints of a training run. The only training file that knows Orbax.

    step_00000100/
      weights/        trained weights alone (adapters, projector, …), Orbax
      optimizer/      the optimizer's state, Orbax
      data.json       position in the data, and state of the run's record
      metadata.json   step, configuration, hash of the frozen base weights, versions
      manifest.json   size and SHA-256 of every other file

Base weights are named by hash, not copied. Orbax does not notice a flipped bit and casts silently,
so integrity rests on the manifest: a step is written under another name, hashed, and renamed into
place last. A directory whose files differ from its manifest does not count as saved.

With several processes, each writes and reads its shards, on a file system that all of them see;
the first one hashes, names, verifies and removes.
"""

import concurrent.futures
import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from prumerge_jax.messages import shortened
from prumerge_jax.sharding.processes import allgather_ints
from prumerge_jax.store.manifest import size_and_sha256
from prumerge_jax.store.strict_json import load_json
from prumerge_jax.training.step import TrainState
from prumerge_jax.training.weights import Shapes, Weights

_logger = logging.getLogger(__name__)

WEIGHTS, OPTIMIZER = "weights", "optimizer"
DATA, METADATA, MANIFEST = "data.json", "metadata.json", "manifest.json"
_INCOMPLETE, _DAMAGED = ".incomplete", ".damaged"


class CheckpointError(ValueError):
    """A checkpoint is damaged, or belongs to another run; the message names the file or weight."""


class Restored(NamedTuple):
    """What `Checkpoints.restore` returns: the step reached, the state, and `save`'s position."""

    step: int
    state: TrainState
    position: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, written in the background.

    Args:
      directory: holds the steps; created if it does not exist. What a killed run left unfinished
        is removed.
      keep: how many steps to keep; older ones are removed once a newer one is complete.
      metadata: JSON values written with every step. `base_weights`, the hash of the frozen weights,
        must be equal at restore.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, keep: int, metadata: Mapping[str, Any]
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; expected at least 1 checkpoint")
        self._directory = pathlib.Path(directory).resolve()
        self._keep = keep
        self._metadata = dict(metadata)
        self._saver = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._saving: concurrent.futures.Future[None] | None = None
        self._is_writer = jax.process_index() == 0
        logging.getLogger("absl").addFilter(_is_not_traceback_of_orbax)
        self._directory.mkdir(parents=True, exist_ok=True)
        if self._is_writer:
            for leftover in self._directory.glob(f"*{_INCOMPLETE}*"):
                _logger.info("removing %s, which an earlier run did not finish", leftover)
                shutil.rmtree(leftover)

    def steps(self) -> list[int]:
        """The steps that were saved, ascending; not verified."""
        names = (path.name.removeprefix("step_") for path in self._directory.glob("step_*"))
        return sorted(int(name) for name in names if name.isdigit())

    def save(self, step: int, state: TrainState, position: Mapping[str, Any]) -> None:
        """Starts to save a step, after an earlier save has ended; `state` may be donated at once.

        A step that exists already is not saved again. A save that fails (a full disk) is logged,
        its files are removed, older steps are kept, and the run continues; only `close` raises.

        Args:
          step: number of optimizer steps done.
          state: saved in its shards.
          position: position in the data and state of the run's record, JSON values.
        """
        if step in self.steps():
            return
        self.wait()
        target = self._path(step)
        incomplete = target.with_name(target.name + _INCOMPLETE)
        records = {DATA: dict(position), METADATA: {"step": step, **self._metadata}}
        items = {WEIGHTS: state.trained, OPTIMIZER: state.optimizer}
        try:
            # Returns when the arrays are copied; files are written in the background.
            writing = ocp.save_checkpointables_async(incomplete, items)
        except Exception as error:
            self._saving = concurrent.futures.Future()
            self._saving.set_exception(error)
            self._abandon(target, error)
            return
        self._saving = self._saver.submit(self._finish, writing, incomplete, target, records)

    def wait(self) -> None:
        """Returns when no save is under way."""
        if self._saving is not None:
            concurrent.futures.wait([self._saving])

    def close(self) -> None:
        """Waits for the last save.

        Raises:
          CheckpointError: the last save failed.
        """
        self._saver.shutdown()
        if self._saving is not None and (error := self._saving.exception()):
            reason = shortened(" ".join(str(error).split()), 300)
            raise CheckpointError(
                f"the last checkpoint was not saved: {reason}; {self._directory} has those of the "
                f"steps {self.steps()}"
            ) from error

    def restore(self, target: TrainState) -> Restored | None:
        """Restores the newest intact step, straight into the shards of `target`.

        A damaged step is set aside (`….damaged`) with a logged error, and the step before is used.

        Args:
          target: `jax.ShapeDtypeStruct`s with shardings.

        Returns:
          None where nothing was ever saved.

        Raises:
          CheckpointError: every step is damaged, or the step belongs to another run: a weight is
            missing, unknown or of another shape or dtype, or the base weights are others.
        """
        # One process looks and all load the same: files may change while other processes look.
        newest = self._newest_intact() if self._is_writer else None
        step = int(allgather_ints([newest or 0])[0, 0])
        return self._load(self._path(step), step, target) if step else None

    def _newest_intact(self) -> int | None:
        steps = self.steps()
        for step in reversed(steps):
            try:
                verify(self._path(step))
            except CheckpointError as error:
                _logger.error("checkpoint of step %d is DAMAGED and not used: %s", step, error)
                _set_aside(self._path(step))
                continue
            return step
        if steps:
            raise CheckpointError(
                f"{self._directory}: no intact checkpoint among the steps {steps}; the log names "
                "the damaged files. Start again in an empty workdir, or restore the files"
            )
        return None

    def _load(self, path: pathlib.Path, step: int, target: TrainState) -> Restored:
        metadata = load_json(path / METADATA)
        expected = self._metadata.get("base_weights")
        if metadata.get("base_weights") != expected:
            raise CheckpointError(
                f"{path} was trained on base weights with hash {metadata.get('base_weights')}, "
                f"this run has {expected}; expected the same base weights"
            )
        items = _load_items(path, {WEIGHTS: target.trained, OPTIMIZER: target.optimizer})
        state = TrainState(items[WEIGHTS], items[OPTIMIZER])
        return Restored(step, state, load_json(path / DATA))

    def _path(self, step: int) -> pathlib.Path:
        return self._directory / f"step_{step:08d}"

    def _finish(
        self,
        writing: ocp.AsyncResponse[None],
        incomplete: pathlib.Path,
        target: pathlib.Path,
        records: Mapping[str, Any],
    ) -> None:
        try:
            writing.result()
            if self._is_writer:
                for name, values in records.items():
                    (incomplete / name).write_text(json.dumps(values, indent=1))
                write_manifest(incomplete)
                incomplete.rename(target)
                for step in self.steps()[: -self._keep]:
                    _remove(self._path(step))
        except Exception as error:
            self._abandon(target, error)
            raise

    def _abandon(self, target: pathlib.Path, error: Exception) -> None:
        _logger.error(
            "checkpoint %s was NOT saved, older ones are intact: %s",
            target.name, shortened(" ".join(str(error).split()), 300),
        )  # fmt: skip
        if self._is_writer:
            for leftover in self._directory.glob(f"{target.name}{_INCOMPLETE}*"):
                shutil.rmtree(leftover, ignore_errors=True)


def load_trained(step_directory: str | os.PathLike[str], shapes: Shapes) -> Weights:
    """The trained weights of one checkpoint alone, without the optimizer's state.

    Args:
      step_directory: a `step_…` directory; verified first.
      shapes: by dotted path, with shardings.

    Raises:
      CheckpointError: a file is damaged, or the weights are not these.
    """
    path = pathlib.Path(step_directory).resolve()
    verify(path)
    return _load_items(path, {WEIGHTS: shapes})[WEIGHTS]


def write_manifest(directory: pathlib.Path) -> None:
    """Hashes every file of a directory into its `manifest.json`."""
    files = {}
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        size, digest = size_and_sha256(file)
        files[file.relative_to(directory).as_posix()] = {"size": size, "sha256": digest}
    manifest = {"files": files, "sha256": _digest(files)}
    with open(directory / MANIFEST, "w") as opened:
        json.dump(manifest, opened, indent=1)
        opened.flush()
        os.fsync(opened.fileno())


def verify(directory: pathlib.Path) -> None:
    """Compares every file of a checkpoint with its manifest.

    Raises:
      CheckpointError: a file is missing, of another size or altered (the manifest itself
        included); the message names it.
    """
    path = directory / MANIFEST
    try:
        manifest = load_json(path)
        files = manifest["files"]
        if manifest["sha256"] != _digest(files):
            raise ValueError("its own hash differs")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is missing or was altered: {error}") from error
    for name, entry in files.items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        size, digest = size_and_sha256(file)
        if size != entry["size"]:
            raise CheckpointError(f"{file} has {size} bytes, the manifest says {entry['size']}")
        if digest != entry["sha256"]:
            raise CheckpointError(f"{file} was altered: its SHA-256 differs from the manifest's")


def _load_items(path: pathlib.Path, targets: Mapping[str, Any]) -> dict[str, Any]:
    stored = ocp.checkpointables_metadata(path).metadata
    for item, target in targets.items():
        _check_same(_describe(stored[item]), _describe(target), f"{path}: {item}")
    return ocp.load_checkpointables(path, dict(targets))


def _describe(tree: Any) -> dict[str, tuple[tuple[int, ...], jnp.dtype]]:
    """Shape and dtype of every leaf by its path; tuples and lists count as the same."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (leaf.shape, jnp.dtype(leaf.dtype))
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda node: hasattr(node, "shape")
        )
    }


def _check_same(stored: dict[str, Any], expected: dict[str, Any], where: str) -> None:
    if missing := sorted(set(expected) - set(stored)):
        raise CheckpointError(f"{where} lacks {missing}; is this checkpoint of another stage?")
    if unknown := sorted(set(stored) - set(expected)):
        raise CheckpointError(f"{where} holds {unknown}, which this run does not train")
    for name, description in expected.items():
        if stored[name] != description:
            found, wanted = stored[name], description
            raise CheckpointError(
                f"{where}: {name} is {found[1]} {found[0]}, this run expects {wanted[1]} "
                f"{wanted[0]}; nothing is cast or reshaped"
            )


def _is_not_traceback_of_orbax(record: logging.LogRecord) -> bool:
    """Every thread of Orbax logs a failed save with its traceback; `Checkpoints` says it once."""
    return not (record.exc_info and "orbax" in record.pathname)


def _digest(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _remove(path: pathlib.Path) -> None:
    # Renamed first: a kill in the middle must not leave half a step under its final name.
    doomed = path.with_name(path.name + _INCOMPLETE)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _set_aside(path: pathlib.Path) -> None:
    aside = path.with_name(path.name + _DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
