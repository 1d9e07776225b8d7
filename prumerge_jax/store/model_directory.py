"""A model on disk: the directory that conversion and training write and `Llava.load` reads.

    config.json               sizes of the model, of its adapters if it has any; format of its
                              quantised kernels
    params/<dotted path>/     one Orbax checkpoint per weight, layers stacked
    manifest.json             every file's size and SHA-256; every weight's shape, dtype, SHA-256
    ...                       tokenizer and processor files, copied

One checkpoint per weight lets a writer hold a single weight in memory and lets a reader put each
one straight into its shards. Orbax does not notice a flipped bit and casts silently, so integrity
and dtypes rest on the manifest. It is written last, and the complete directory is renamed into
place: what has no manifest was never finished, and nothing here reads it.
"""

import concurrent.futures
import json
import os
import pathlib
import shutil
import types
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from prumerge_jax.store.array_files import ArrayFile, save
from prumerge_jax.store.atomic import StagedDirectory
from prumerge_jax.store.errors import DirectoryError
from prumerge_jax.store.manifest import (
    DOTTED_PATH,
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    PARAMS,
    Manifest,
    StoredArray,
    read_manifest,
    size_and_sha256,
    verify,
    weights_identity,
    write_manifest,
)
from prumerge_jax.store.strict_json import load_json, to_json

__all__ = [
    "DirectoryError",
    "DirectoryWriter",
    "load_array",
    "load_arrays",
    "read_array",
    "read_manifest",
    "read_sections",
    "verify",
    "weights_identity",
]

CONFIG = "config.json"


class DirectoryWriter:
    """Writes a model directory that either appears complete or not at all.

    Used as a context manager: a clean exit commits, an exception removes what was written. What a
    killed process leaves never loads, see `StagedDirectory`.

    All processes of a run write together, on a file system that all of them see: each its
    shards of every weight, and the first one everything else.

    Attributes:
      source: facts for the manifest; what is known late is added before the context is left.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: Any,
        *,
        adapter: Any = None,
        quantize: str | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        """Prepares to write; nothing is created before the context is entered.

        Args:
          directory: the final place, which must not exist yet.
          config: sizes of the model, a dataclass of JSON values.
          adapter: a dataclass that describes its low-rank adapters, if the weights hold any.
          quantize: name of the format of its quantised kernels, if the weights hold any.
          source: JSON-serialisable facts on where the weights come from, kept in the manifest.
        """
        self._staged = StagedDirectory(directory)
        self._root = self._staged.path
        self._config = config
        self._adapter = adapter
        self._quantize = quantize
        self.source = dict(source or {})
        self._arrays: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        self._digests: dict[str, concurrent.futures.Future[str]] = {}
        self._files: dict[str, concurrent.futures.Future[tuple[int, str]]] = {}

    def __enter__(self) -> Self:
        """Creates the temporary directory.

        Raises:
          DirectoryError: the final directory exists, or another process is writing it.
        """
        self._is_first = jax.process_index() == 0
        if not self._is_first:
            return self
        self._staged.__enter__()
        self._hasher = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        try:
            (self._root / PARAMS).mkdir()
            sections = {"format": FORMAT, "format_version": FORMAT_VERSION}
            sections["model"] = to_json(self._config)
            sections["adapter"] = None if self._adapter is None else to_json(self._adapter)
            if self._quantize is not None:  # older versions of this program refuse what is new
                sections["quantize"] = self._quantize
            self.write_file(CONFIG, _dump(sections))
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def write_array(self, path: str, array: np.ndarray | jax.Array) -> None:
        """Writes one weight. A numpy array is not copied; it must not change during the call.

        Args:
          path: dotted, as in a flattened state of the model.
          array: stored in its own dtype.

        Raises:
          DirectoryError: the path is malformed or was written before.
        """
        if not DOTTED_PATH.fullmatch(path):
            raise DirectoryError(f"{path!r} is not a dotted weight path")
        if path in self._arrays:
            raise DirectoryError(f"weight {path} was written twice")
        folder = self._root / PARAMS / path
        save(folder, array)
        if not self._is_first:
            return
        self._arrays[path] = tuple(array.shape), np.dtype(array.dtype)
        # What was written is read back: of an array sharded over processes nobody holds all.
        stored = ArrayFile(folder, *self._arrays[path])
        self._digests[path] = self._hasher.submit(stored.sha256)
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self._add(file)

    def write_file(self, name: str, content: bytes | pathlib.Path) -> None:
        """Adds a plain file under `name`: these bytes, or a copy of that file.

        Raises:
          DirectoryError: `name` is not a plain file name, or was written before.
        """
        if pathlib.Path(name).name != name or name in ("..", MANIFEST, PARAMS):
            raise DirectoryError(f"{name!r} is not a plain, free file name")
        if name in self._files:
            raise DirectoryError(f"file {name} was written twice")
        if not self._is_first:
            return
        target = self._root / name
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            shutil.copyfile(content, target)
        self._add(target)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        """Commits, or removes everything where an exception is under way."""
        if not self._is_first:
            return
        try:
            if kind is None:
                self._write_manifest()
        except BaseException as failure:
            kind, error, traceback = type(failure), failure, failure.__traceback__
            raise
        finally:
            self._hasher.shutdown(cancel_futures=True)
            self._staged.__exit__(kind, error, traceback)

    def _write_manifest(self) -> None:
        files = {name: future.result() for name, future in self._files.items()}
        arrays = {
            path: StoredArray(shape, dtype, self._digests[path].result())
            for path, (shape, dtype) in self._arrays.items()
        }
        write_manifest(self._root, Manifest(arrays, files, self.source))

    def _add(self, file: pathlib.Path) -> None:
        # Hashed while the next weight is read; the file is still in the page cache.
        name = file.relative_to(self._root).as_posix()
        self._files[name] = self._hasher.submit(size_and_sha256, file)


def read_sections(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The sections `model`, `adapter` and, of quantised models, `quantize` of `config.json`, parsed
    and not yet checked.

    Raises:
      DirectoryError: no finished model directory, or its `config.json` was altered or is malformed.
    """
    path = pathlib.Path(directory) / CONFIG
    size_and_digest = read_manifest(directory).files.get(CONFIG)
    if not path.is_file() or size_and_sha256(path) != size_and_digest:
        raise DirectoryError(f"{path} is missing or was altered: the manifest has another hash")
    sections = load_json(path)
    if not isinstance(sections, dict) or not {"model", "adapter"} <= set(sections):
        raise DirectoryError(f"{path}: malformed: needs the sections 'model' and 'adapter'")
    return sections


def load_arrays(
    directory: str | os.PathLike[str], targets: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Reads every weight straight into its shards.

    Args:
      directory: a model directory; its content is taken as it is, see `verify`.
      targets: by dotted path the wanted shape, dtype and sharding (None: the default device). Each
        process reads only what its own devices hold.

    Returns:
      The weights by path. One whose stored dtype differs is cast on its devices after reading.

    Raises:
      DirectoryError: a weight is missing, left over, of another shape or unreadable.
    """
    check_arrays(directory, targets)
    return {path: load_array(directory, path, target) for path, target in targets.items()}


def check_arrays(
    directory: str | os.PathLike[str], targets: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
    """Raises DirectoryError unless a directory holds exactly these weights, of these shapes."""
    root = pathlib.Path(directory)
    stored = read_manifest(root).arrays
    if missing := sorted(set(targets) - set(stored)):
        raise DirectoryError(f"{root} lacks the weights {missing}")
    if leftover := sorted(set(stored) - set(targets)):
        raise DirectoryError(f"{root} holds weights that the model does not have: {leftover}")
    wrong = [
        f"{path}: stored {stored[path].shape}, expected {tuple(target.shape)}"
        for path, target in targets.items()
        if stored[path].shape != tuple(target.shape)
    ]
    if wrong:
        raise DirectoryError(f"{root} holds weights of another shape: {'; '.join(wrong)}")
    for path, target in targets.items():
        found = stored[path].dtype
        is_integer = jnp.issubdtype(target.dtype, jnp.integer)
        if found != target.dtype and (is_integer or jnp.issubdtype(found, jnp.integer)):
            raise DirectoryError(f"{root}: {path} is stored as {found}, expected {target.dtype}")


def load_array(
    directory: str | os.PathLike[str], path: str, target: jax.ShapeDtypeStruct
) -> jax.Array:
    """Reads one weight straight into its shards; see `load_arrays`.

    The host holds the weight once, in addition to its shards, until it is on the devices.
    """
    sharding = target.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    folder = pathlib.Path(directory) / PARAMS / path
    places = sharding.addressable_devices_indices_map(target.shape)
    # Codes of four bits are read as such; everything else as it is stored.
    stored = ArrayFile(folder, target.shape, target.dtype, is_read_in_parts=len(places) > 1)
    shards = [jax.device_put(stored.read(index), device) for device, index in places.items()]
    array = jax.make_array_from_single_device_arrays(target.shape, sharding, shards)
    array.block_until_ready()
    if array.dtype == target.dtype:
        return array
    cast = jax.jit(lambda x: x.astype(target.dtype), out_shardings=sharding)
    return cast(array)


def read_array(directory: str | os.PathLike[str], path: str) -> np.ndarray:
    """Reads one weight into host memory, in its stored dtype, with no second copy on the way.

    Raises:
      DirectoryError: the directory lacks it, or it is unreadable.
    """
    stored = read_manifest(directory).arrays.get(path)
    if stored is None:
        raise DirectoryError(f"{directory} lacks the weight {path}")
    return stored.open(pathlib.Path(directory) / PARAMS / path).read()


def _dump(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, allow_nan=False) + "\n").encode()
