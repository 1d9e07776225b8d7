"""safetensors files: a reader that trusts nothing, and a writer that streams.

Format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}},
then the raw tensors without gaps (github.com/huggingface/safetensors).
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from prumerge_jax.conversion.tensor_files import (
    Checkpoint,
    ConversionError,
    TensorInfo,
    listing,
    open_indexed,
    read_exactly,
)
from prumerge_jax.store.strict_json import parse_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
_DTYPE_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
# A 13B model in one file has 760 tensors and a header of 0.1 MB. The format allows 100 MB, with
# which a small file could fill memory.
_MAX_HEADER_BYTES = 2 << 20
_MAX_TENSORS = 20_000
_MAX_RANK = 8


class SafetensorsFile:
    """One `.safetensors` file; tensors are read by position, never mapped into memory.

    Attributes:
      path: path of the file.
      tensors: shape and dtype by name.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the file and validates its header against its size.

        Raises:
          ConversionError: truncated, oversized or malformed header, an unknown dtype, offsets that
            overlap, leave gaps, leave the file or disagree with a shape, repeated names.
          OSError: the file cannot be read.
        """
        self.path = pathlib.Path(path)
        self._begin, self._data_bytes, header = self._read_header()
        self.tensors: dict[str, TensorInfo] = {}
        self._offsets: dict[str, int] = {}
        self._parse(header)

    def read(self, name: str) -> np.ndarray:
        """One tensor in a fresh, C-contiguous buffer."""
        info = self.tensors[name]
        raw = read_exactly(self.path, info.nbytes, self._begin + self._offsets[name])
        return raw.view(info.dtype).reshape(info.shape)

    def _read_header(self) -> tuple[int, int, dict[str, Any]]:
        """Where data begins, how many bytes it has, and the header."""
        size = self.path.stat().st_size
        if size < 8:
            raise ConversionError(f"{self.path}: {size} bytes are not a safetensors file")
        length = int.from_bytes(read_exactly(self.path, 8, 0).tobytes(), "little")
        if length > _MAX_HEADER_BYTES or length > size - 8:
            raise ConversionError(
                f"{self.path}: declares a header of {length} bytes in a file of {size}, expected "
                f"at most {_MAX_HEADER_BYTES}; truncated or not a safetensors file"
            )
        raw = read_exactly(self.path, length, 8).tobytes()
        try:
            header = parse_json(raw, f"{self.path}: header")
        except ValueError as error:
            raise ConversionError(str(error)) from None
        if not isinstance(header, dict):
            raise ConversionError(f"{self.path}: the header is not an object")
        header.pop("__metadata__", None)
        if len(header) > _MAX_TENSORS:
            raise ConversionError(
                f"{self.path}: {len(header)} tensors in one file, expected at most {_MAX_TENSORS}"
            )
        return 8 + length, size - 8 - length, header

    def _parse(self, header: dict[str, Any]) -> None:
        ends: list[tuple[int, int, str]] = []
        for name, entry in header.items():
            info, begin, end = self._entry(name, entry)
            self.tensors[name], self._offsets[name] = info, begin
            ends.append((begin, end, name))
        expected = 0
        for begin, end, name in sorted(ends):
            if begin != expected:
                fault = "overlaps another tensor" if begin < expected else "follows a gap"
                raise ConversionError(f"{self.path}: {name[:80]} {fault}")
            expected = end
        if expected != self._data_bytes:
            raise ConversionError(
                f"{self.path}: holds {self._data_bytes} bytes of data, its header describes "
                f"{expected}; truncated or altered"
            )

    def _entry(self, name: str, entry: Any) -> tuple[TensorInfo, int, int]:
        where = f"{self.path}: {name[:80]}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise ConversionError(f"{where}: malformed header entry")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPES:
            raise ConversionError(
                f"{where}: unsupported dtype {dtype!r:.40}; expected one of {sorted(_DTYPES)}"
            )
        if not _is_list_of_sizes(shape) or len(shape) > _MAX_RANK:
            raise ConversionError(f"{where}: malformed shape {shape!r:.80}")
        if not _is_list_of_sizes(offsets) or len(offsets) != 2:
            raise ConversionError(f"{where}: malformed data_offsets {offsets!r:.80}")
        begin, end = offsets
        nbytes = math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize
        if end - begin != nbytes:
            raise ConversionError(
                f"{where}: data_offsets {begin} to {end} do not hold {nbytes} bytes of "
                f"{dtype} {shape}"
            )
        if end > self._data_bytes:
            raise ConversionError(
                f"{where}: its data ends at {end}, the file's at {self._data_bytes}; truncated"
            )
        return TensorInfo(tuple(shape), np.dtype(_DTYPES[dtype])), begin, end


class ShardedWriter:
    """Streams named tensors into `model.safetensors`, or into shards with an index.

    All names, shapes and dtypes are declared first, so headers are final before the first tensor
    is written; tensors may then come in any order, one at a time. Tensors keep the declared order
    on disk and a shard ends before it would exceed `max_shard_bytes`.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        tensors: Mapping[str, TensorInfo],
        max_shard_bytes: int = 5_000_000_000,
        stem: str = "model",
    ) -> None:
        """Creates all files at their final size, named `<stem>...safetensors`.

        Raises:
          ConversionError: a dtype that safetensors (or this module) does not know.
        """
        self._places: dict[str, tuple[pathlib.Path, int]] = {}
        self._unwritten = dict(tensors)
        shards = _plan_shards(tensors, max_shard_bytes)
        self.names = [
            f"{stem}{f'-{i:05d}-of-{len(shards):05d}' if len(shards) > 1 else ''}.safetensors"
            for i in range(1, len(shards) + 1)
        ]
        for name, keys in zip(self.names, shards, strict=True):
            self._create(folder / name, keys)
        if len(shards) > 1:
            total = sum(info.nbytes for info in tensors.values())
            weight_map = {
                key: name for name, keys in zip(self.names, shards, strict=True) for key in keys
            }
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / f"{stem}.safetensors.index.json").write_text(
                json.dumps(index, indent=2) + "\n"
            )

    def write(self, name: str, array: np.ndarray) -> None:
        """Writes one declared tensor.

        Raises:
          ConversionError: not declared, already written, or of another shape or dtype.
        """
        info = self._unwritten.get(name)
        if info is None:
            raise ConversionError(f"{name} was written before or never declared")
        if (array.shape, array.dtype) != (info.shape, info.dtype):
            raise ConversionError(
                f"{name}: {array.dtype} {array.shape}, declared {info.dtype} {info.shape}"
            )
        path, position = self._places[name]
        with open(path, "r+b", buffering=0) as file:
            file.seek(position)
            view, done = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, 0
            while done < len(view):
                done += file.write(view[done:])
        del self._unwritten[name]

    def finish(self) -> None:
        """Asserts that the files are complete.

        Raises:
          ConversionError: a declared tensor was never written.
        """
        if self._unwritten:
            raise ConversionError(f"never written: {listing(self._unwritten)}")

    def _create(self, path: pathlib.Path, keys: Sequence[str]) -> None:
        raw, offsets = _header({key: self._unwritten[key] for key in keys})
        with open(path, "xb") as file:
            file.write(raw)
            file.truncate(len(raw) + sum(self._unwritten[key].nbytes for key in keys))
        self._places.update({key: (path, offset) for key, offset in offsets.items()})


def open_safetensors(folder: pathlib.Path) -> Checkpoint | None:
    """The `model.safetensors` or its indexed shards in a folder, None where there are none.

    Raises:
      ConversionError: they are malformed.
    """
    if (folder / INDEX).is_file():
        return open_indexed(folder / INDEX, SafetensorsFile, ".safetensors")
    if (folder / SINGLE).is_file():
        return Checkpoint([SafetensorsFile(folder / SINGLE)])
    return None


def encode(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A few small tensors as the content of one `.safetensors` file."""
    raw, _ = _header({name: TensorInfo(a.shape, a.dtype) for name, a in tensors.items()})
    return raw + b"".join(np.ascontiguousarray(a).tobytes() for a in tensors.values())


def _header(tensors: Mapping[str, TensorInfo]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, and the place of each tensor in the file."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in tensors.items():
        if info.dtype not in _DTYPE_NAMES:
            raise ConversionError(f"{name}: safetensors cannot hold {info.dtype}")
        begin, end = end, end + info.nbytes
        entries[name] = {
            "dtype": _DTYPE_NAMES[info.dtype],
            "shape": list(info.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # tensor data begins aligned
    raw = len(text).to_bytes(8, "little") + text
    return raw, {name: len(raw) + entries[name]["data_offsets"][0] for name in tensors}


def _plan_shards(tensors: Mapping[str, TensorInfo], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, info in tensors.items():
        if shards[-1] and used + info.nbytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += info.nbytes
    return shards


def _is_list_of_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 62 for n in value
    )
