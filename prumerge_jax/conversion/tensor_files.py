"""Files of named tensors, and checkpoints made of several of them."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from prumerge_jax.families.fields import ConversionError
from prumerge_jax.store.strict_json import load_json


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor, known without reading its data."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class TensorFile(Protocol):
    """A file of named tensors that are read one at a time."""

    @property
    def path(self) -> pathlib.Path:
        """Where the file is."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Shape and dtype by name."""

    def read(self, name: str) -> np.ndarray:
        """One tensor in a fresh buffer."""


class Checkpoint:
    """The tensors of one or several files under their names."""

    def __init__(self, files: Iterable[TensorFile]) -> None:
        """Joins files.

        Raises:
          ConversionError: two files hold a tensor of the same name.
        """
        self.files = tuple(files)
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, TensorFile] = {}
        for file in self.files:
            if repeated := sorted(set(file.tensors) & set(self.tensors)):
                other = self._file_of[repeated[0]].path.name
                raise ConversionError(
                    f"{file.path}: tensors also stored in {other}: {listing(repeated)}"
                )
            self.tensors.update(file.tensors)
            self._file_of.update(dict.fromkeys(file.tensors, file))

    def read(self, name: str) -> np.ndarray:
        """One tensor, see `TensorFile.read`."""
        return self._file_of[name].read(name)


class Tensor(Protocol):
    """A tensor of a checkpoint, read when it is asked for."""

    @property
    def info(self) -> TensorInfo:
        """Shape, and the dtype in which it is to be stored unless another is asked for."""

    def read(self) -> np.ndarray:
        """The values, all of them finite; their dtype may be wider than `info` says.

        Raises:
          ConversionError: NaN or infinity among them.
        """


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file holds it."""

    checkpoint: Checkpoint
    key: str

    @property
    def info(self) -> TensorInfo:
        """Shape and dtype."""
        return self.checkpoint.tensors[self.key]

    def read(self) -> np.ndarray:
        """The tensor's values; see `Tensor`."""
        array = self.checkpoint.read(self.key)
        if not is_finite(array):
            raise ConversionError(f"{self.key}: holds NaN or infinity; the checkpoint is damaged")
        return array


def is_finite(array: np.ndarray) -> bool:
    """Whether all values of a float array are finite; reads bits, which is fast for every dtype."""
    bits = {2: np.uint16, 4: np.uint32}.get(array.dtype.itemsize)
    if bits is None or not array.size:
        return bool(np.isfinite(array).all())
    sign = 1 << (8 * array.dtype.itemsize - 1)
    infinity = int(np.array(np.inf, array.dtype).view(bits))
    return int((array.view(bits) & bits(sign - 1)).max()) < infinity


def open_indexed(
    index: pathlib.Path, open_file: Callable[[pathlib.Path], TensorFile], suffix: str
) -> Checkpoint:
    """Opens the shards that an index file (`{"weight_map": {tensor: file}}`) lists.

    Args:
      index: the JSON file; the shards are in the same folder.
      open_file: opens one shard.
      suffix: what every shard's name must end in.

    Raises:
      ConversionError: malformed, a shard's name is not a plain file name, a shard is missing, or
        index and shards disagree on which tensors there are.
    """
    weight_map = load_object(index, max_bytes=4 << 20).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index}: no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or pathlib.PurePath(name).name != name or "\\" in name:
            raise ConversionError(f"{index}: shard {name!r:.80} is not a plain file name")
        if not name.endswith(suffix):
            raise ConversionError(f"{index}: shard {name!r:.80} does not end in {suffix}")
    shards = sorted(set(weight_map.values()))
    if missing := [name for name in shards if not (index.parent / name).is_file()]:
        raise ConversionError(f"{index}: missing shards: {listing(missing)}")
    checkpoint = Checkpoint(open_file(index.parent / name) for name in shards)
    stored = {key: file.path.name for file in checkpoint.files for key in file.tensors}
    if wrong := sorted(key for key in weight_map if stored.get(key) != weight_map[key]):
        raise ConversionError(f"{index}: not in the shard it names: {listing(wrong)}")
    if unlisted := sorted(set(stored) - set(weight_map)):
        raise ConversionError(f"{index}: in a shard but not in the index: {listing(unlisted)}")
    return checkpoint


def read_exactly(path: pathlib.Path, count: int, position: int) -> np.ndarray:
    """`count` bytes of a file from a position, as uint8.

    Read, not mapped: mapped pages would count as this process's memory.

    Raises:
      ConversionError: the file ends before that.
    """
    buffer = np.empty(count, np.uint8)
    with open(path, "rb", buffering=0) as file:
        file.seek(position)
        done = 0
        while done < count:
            read = file.readinto(buffer.data[done:])
            if not read:
                raise ConversionError(f"{path}: ends early; it changed while it was read")
            done += read
    return buffer


def load_object(path: pathlib.Path, max_bytes: int = 1 << 20) -> dict[str, Any]:
    """Reads a JSON file that must hold one object.

    Raises:
      ConversionError: oversized, not strict JSON, or not an object.
    """
    try:
        values = load_json(path, max_bytes)
    except ValueError as error:
        raise ConversionError(str(error)) from None
    if not isinstance(values, dict):
        raise ConversionError(f"{path}: expected an object, got {type(values).__name__}")
    return values


def listing(names: Iterable[str], limit: int = 8) -> str:
    """Names for an error message; beyond `limit` the rest is counted."""
    names = list(names)
    shown = ", ".join(name[:80] for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
