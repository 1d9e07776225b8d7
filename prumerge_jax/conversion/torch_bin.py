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

from prumerge_jax.conversion.tensor_files import CheckpointError, TensorInfo, read_exactly
from prumerge_jax.conversion.torch_pickle import TensorRef, interpret, write_pickle

_MAX_PICKLE_BYTES = 8 << 20  # a 13B model's has 0.1 MB


class TorchFile:
    """One `.bin` file that holds a state dict; tensors are read by position.

    Attributes:
      path: of the file.
      tensors: shape and dtype by name.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the file and interprets its pickle.

        Raises:
          CheckpointError: not such a zip (truncated, corrupt, or older than torch 1.6), anything
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
            raise CheckpointError(f"{self.path}: a zip without data.pkl, not written by torch.save")
        begin, size = self._entries["data.pkl"]
        if size > _MAX_PICKLE_BYTES:
            raise CheckpointError(f"{self.path}: data.pkl has {size} bytes, too many for tensors")
        position, length = self._entries.get("byteorder", (0, 0))
        if length and read_exactly(self.path, min(length, 16), position).tobytes() != b"little":
            raise CheckpointError(f"{self.path}: only little-endian files are supported")
        return read_exactly(self.path, size, begin).tobytes()

    def _check(self, name: str, tensor: TensorRef) -> None:
        storage, where = tensor.storage, f"{self.path}: {name[:200]}"
        entry = self._entries.get(f"data/{storage.key}")
        if entry is None:
            raise CheckpointError(f"{where}: its storage {storage.key[:40]!r} is missing")
        if entry[1] != storage.numel * storage.dtype.itemsize:
            raise CheckpointError(
                f"{where}: its storage has {entry[1]} bytes, "
                f"{storage.numel} elements of {storage.dtype} need another number"
            )
        numel = 1
        for size in tensor.shape:
            numel *= size
        # More elements than the storage has means repeated ones: a few bytes could fill memory.
        if numel > storage.numel or tensor.offset + tensor.extent > storage.numel:
            raise CheckpointError(
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
        raise CheckpointError(
            f"{path}: a bare pickle, as torch before 1.6 wrote; load and save it with a newer one"
        )
    if magic != b"PK\x03\x04":
        raise CheckpointError(f"{path}: not a file of torch.save")
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path}: corrupt or truncated, its zip directory cannot be read ({error}); "
            "download it again"
        ) from None
    entries: dict[str, tuple[int, int]] = {}
    for info in infos:
        root, _, name = info.filename.partition("/")
        if not root or not name or name in entries or ".." in name.split("/"):
            raise CheckpointError(f"{path}: unexpected or repeated entry {info.filename[:200]!r}")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise CheckpointError(f"{path}: entry {name[:200]!r} is compressed")
        begin = _data_begin(path, info, end_of_file)
        if begin + info.file_size > end_of_file:
            raise CheckpointError(f"{path}: truncated, entry {name[:200]!r} ends after the file")
        entries[name] = begin, info.file_size
    return entries


def _data_begin(path: pathlib.Path, info: zipfile.ZipInfo, end_of_file: int) -> int:
    header = b""
    if 0 <= info.header_offset <= end_of_file - 30:
        header = read_exactly(path, 30, info.header_offset).tobytes()
    if header[:4] != b"PK\x03\x04":
        raise CheckpointError(f"{path}: corrupt, no entry where {info.filename[:200]!r} should be")
    name_length = int.from_bytes(header[26:28], "little")
    extra_length = int.from_bytes(header[28:30], "little")
    return info.header_offset + 30 + name_length + extra_length
