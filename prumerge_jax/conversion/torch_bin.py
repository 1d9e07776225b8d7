"""PyTorch's `.bin` files without PyTorch and without unpickling.

torch.save (>= 1.6) writes a zip of a pickled structure, `data.pkl` (see `torch_pickle`), and one
uncompressed entry per storage.
"""

import io
import os
import pathlib
import zipfile
from collections.abc import Mapping

import numpy as np

from prumerge_jax.conversion.tensor_files import ConversionError, TensorInfo, read_exactly
from prumerge_jax.conversion.torch_pickle import TensorRef, interpret, write_pickle

_MAX_PICKLE_BYTES = 1 << 20  # a 13B model's has 0.1 MB
_MAX_DIRECTORY_BYTES = 1 << 20  # of the zip; a 13B model's has 0.1 MB


class TorchFile:
    """One `.bin` file that holds a state dict; tensors are read by position.

    Attributes:
      path: path of the file.
      tensors: shape and dtype by name.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the file and interprets its pickle.

        Raises:
          ConversionError: not such a zip (truncated, corrupt, or older than torch 1.6), anything
            in the pickle but a flat dictionary of tensors, or tensors that leave their storage.
          OSError: the file cannot be read.
        """
        self.path = pathlib.Path(path)
        self._entries = _read_directory(self.path)
        self._tensors = interpret(self._pickle(), str(self.path))
        for name, tensor in self._tensors.items():
            self._check(name, tensor)
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tensor.shape, tensor.storage.dtype)
            for name, tensor in self._tensors.items()
        }

    def read(self, name: str) -> np.ndarray:
        """One tensor in a fresh, C-contiguous buffer."""
        tensor = self._tensors[name]
        itemsize = tensor.storage.dtype.itemsize
        begin, _ = self._entries[f"data/{tensor.storage.key}"]
        raw = read_exactly(self.path, tensor.extent * itemsize, begin + tensor.offset * itemsize)
        values = np.lib.stride_tricks.as_strided(
            raw.view(tensor.storage.dtype),
            tensor.shape,
            [stride * itemsize for stride in tensor.strides],
        )
        return np.ascontiguousarray(values).reshape(tensor.shape)

    def _pickle(self) -> bytes:
        if "data.pkl" not in self._entries:
            raise ConversionError(f"{self.path}: a zip without data.pkl, not written by torch.save")
        begin, size = self._entries["data.pkl"]
        if size > _MAX_PICKLE_BYTES:
            raise ConversionError(f"{self.path}: data.pkl has {size} bytes, too many for tensors")
        position, length = self._entries.get("byteorder", (0, 0))
        if length and read_exactly(self.path, min(length, 16), position).tobytes() != b"little":
            raise ConversionError(f"{self.path}: only little-endian files are supported")
        return read_exactly(self.path, size, begin).tobytes()

    def _check(self, name: str, tensor: TensorRef) -> None:
        storage, where = tensor.storage, f"{self.path}: {name[:80]}"
        entry = self._entries.get(f"data/{storage.key}")
        if entry is None:
            raise ConversionError(f"{where}: its storage {storage.key[:80]!r} is missing")
        if entry[1] != storage.numel * storage.dtype.itemsize:
            raise ConversionError(
                f"{where}: its storage has {entry[1]} bytes, "
                f"{storage.numel} elements of {storage.dtype} need another number"
            )
        numel = 1
        for size in tensor.shape:
            numel *= size
        # More elements than the storage has means repeated ones: a few bytes could fill memory.
        if numel > storage.numel or tensor.offset + tensor.extent > storage.numel:
            raise ConversionError(
                f"{where}: shape {list(tensor.shape)[:8]} leaves its storage of {storage.numel}"
            )


def encode(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A few small tensors as a file that `torch.load(weights_only=True)` reads as a dict."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", write_pickle(tensors))
        archive.writestr("archive/byteorder", b"little")
        for number, array in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{number}", np.ascontiguousarray(array).tobytes())
        archive.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def _read_directory(path: pathlib.Path) -> dict[str, tuple[int, int]]:
    """Begin and size of every entry, without the archive's root folder in the names."""
    end_of_file = path.stat().st_size
    magic = read_exactly(path, min(4, end_of_file), 0).tobytes()
    if magic[:1] == b"\x80":
        raise ConversionError(
            f"{path}: a bare pickle, as torch before 1.6 wrote; load and save it with a newer one"
        )
    if magic != b"PK\x03\x04":
        raise ConversionError(f"{path}: not a file of torch.save")
    if (size := _zip_directory_bytes(path, end_of_file)) > _MAX_DIRECTORY_BYTES:
        raise ConversionError(f"{path}: its zip directory has {size} bytes, too many for tensors")
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ConversionError(
            f"{path}: corrupt or truncated, its zip directory cannot be read ({error}); "
            "download it again"
        ) from None
    entries: dict[str, tuple[int, int]] = {}
    for info in infos:
        root, _, name = info.filename.partition("/")
        if not root or not name or name in entries or ".." in name.split("/"):
            raise ConversionError(f"{path}: unexpected or repeated entry {info.filename[:80]!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise ConversionError(f"{path}: entry {name[:80]!r} is compressed")
        begin = _data_begin(path, info, end_of_file)
        if begin + info.file_size > end_of_file:
            raise ConversionError(f"{path}: truncated, entry {name[:80]!r} ends after the file")
        entries[name] = begin, info.file_size
    return entries


def _zip_directory_bytes(path: pathlib.Path, end_of_file: int) -> int:
    """Size that a zip declares for its directory, before `zipfile` parses all of that."""
    length = min(end_of_file, 22 + (1 << 16) + 20)  # the last record, a comment, a zip64 locator
    tail = read_exactly(path, length, end_of_file - length).tobytes()
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or end + 22 > length:
        return 0  # `zipfile` says what is wrong
    if end >= 20 and tail[end - 20 : end - 16] == b"PK\x06\x07":
        position = int.from_bytes(tail[end - 12 : end - 4], "little")
        if position > end_of_file - 56:
            return 0
        record = read_exactly(path, 56, position).tobytes()
        return int.from_bytes(record[40:48], "little")
    return int.from_bytes(tail[end + 12 : end + 16], "little")


def _data_begin(path: pathlib.Path, info: zipfile.ZipInfo, end_of_file: int) -> int:
    header = b""
    if 0 <= info.header_offset <= end_of_file - 30:
        header = read_exactly(path, 30, info.header_offset).tobytes()
    if header[:4] != b"PK\x03\x04":
        raise ConversionError(f"{path}: corrupt, no entry where {info.filename[:80]!r} should be")
    name_length = int.from_bytes(header[26:28], "little")
    extra_length = int.from_bytes(header[28:30], "little")
    return info.header_offset + 30 + name_length + extra_length
