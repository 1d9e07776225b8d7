"""One weight on disk: an Orbax checkpoint of one array, `params/<dotted path>/`."""

import contextlib
import hashlib
import logging
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tensorstore
from orbax.checkpoint import v1 as ocp

from prumerge_jax.store.errors import DirectoryError
from prumerge_jax.store.packing import is_packed, pack, packed_shape, unpack

# Bytes of one stored piece of a weight: what a device reads beyond its own shard is less than this
# at each edge.
_CHUNK_BYTES = 32 << 20


def save(folder: pathlib.Path, array: np.ndarray | jax.Array) -> None:
    """Writes one weight; each process writes its shards, and all return together.

    A numpy array is not copied, but for integers of four bits, which are written packed; it must
    not change during the call.

    Raises:
      DirectoryError: it cannot be written, for example because the disk is full.
    """
    if is_packed(array.dtype):
        array = pack(array)
    context = ocp.Context()
    saving = context.array.saving
    # One uncompressed file per chunk. OCDBT would buffer a second copy of the weight, and random
    # mantissas hardly compress.
    saving.use_ocdbt = False
    saving.use_zarr3 = False
    saving.use_compression = False
    saving.enable_write_sharding_file = False
    if array.nbytes > _CHUNK_BYTES:  # Orbax would cut a small one into single rows, a file each
        saving.storage_options.chunk_byte_size = _CHUNK_BYTES
        saving.storage_options.shard_axes = (0,)
    # Guards asynchronous saves against later changes; this one is synchronous.
    context.memory.deepcopy_host_arrays = False
    try:
        with context, _quiet():
            ocp.save(folder.resolve(), {"value": array})
    except Exception as error:  # of Orbax, TensorStore and their threads, of many classes
        reason = str(error).partition("\n")[0][:200]
        raise DirectoryError(f"{folder} cannot be written: {reason}") from error


class ArrayFile:
    """The array that `save` wrote. Not through Orbax, which holds a weight on the host twice."""

    def __init__(
        self,
        folder: pathlib.Path,
        shape: tuple[int, ...],
        dtype: np.dtype,
        *,
        is_read_in_parts: bool = False,
    ) -> None:
        """Opens it.

        Args:
          folder: what `save` was given.
          shape: expected shape.
          dtype: what the manifest says; of integers of four bits the file has only the bytes.
          is_read_in_parts: keep what was read, so that parts that share a piece read it once.

        Raises:
          DirectoryError: it is missing, malformed, or of another shape.
        """
        self._folder, self._shape, self._dtype = folder.resolve(), shape, dtype
        cache = {"cache_pool": {"total_bytes_limit": 1 << 40}} if is_read_in_parts else {}
        try:
            (header,) = self._folder.rglob(".zarray")
            spec = {
                "driver": "zarr",
                "kvstore": {"driver": "file", "path": str(header.parent)},
                "fill_missing_data_reads": False,
                "context": cache,
            }
            self._stored = tensorstore.open(spec, open=True, read=True).result()
            if self._stored.shape != (packed_shape(shape) if is_packed(dtype) else shape):
                raise ValueError(f"its shape is {self._stored.shape}")
        except (ValueError, OSError) as error:
            raise DirectoryError(f"{folder} cannot be read as {shape}: {error}") from error

    def read(self, index: Any = ()) -> np.ndarray:
        """The part at a numpy index, by default all, in the stored dtype.

        Args:
          index: slices; of integers of four bits the last axis is cut between pairs.

        Raises:
          DirectoryError: a file is missing or truncated.
        """
        if not is_packed(self._dtype):
            return self._bytes(index)
        index = index if isinstance(index, tuple) else (index,)
        if len(index) == len(self._shape):
            start, stop, _ = index[-1].indices(self._shape[-1])
            if start % 2 or stop % 2:
                raise DirectoryError(
                    f"{self._folder}: columns {start} to {stop} do not begin and end between "
                    "pairs of 4-bit integers; split the weight over fewer devices"
                )
            index = (*index[:-1], slice(start // 2, stop // 2))
        return unpack(self._bytes(index), self._dtype)

    def _bytes(self, index: Any) -> np.ndarray:
        """The part of the file at an index, as it is stored."""
        try:
            return self._stored[index].read().result()
        except (ValueError, OSError) as error:
            raise DirectoryError(f"{self._folder} cannot be read: {error}") from error

    def sha256(self) -> str:
        """SHA-256 (hex) of the stored bytes in C order, however they are cut into files.

        Reads as many rows at a time as one stored piece has.
        """
        digest = hashlib.sha256()
        if not self._shape:
            digest.update(self._bytes(()).tobytes())
            return digest.hexdigest()
        pieces: Any = self._stored.chunk_layout.read_chunk.shape
        for start in range(0, self._shape[0], pieces[0]):
            rows = self._bytes(slice(start, min(start + pieces[0], self._shape[0])))
            digest.update(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
        return digest.hexdigest()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops what Orbax reports of every single weight, and that there is no OCDBT to merge."""

    def is_news(record: logging.LogRecord) -> bool:
        is_routine = "Skipping merge of OCDBT" in record.getMessage()
        return record.levelno >= logging.WARNING and not is_routine

    logger = logging.getLogger("absl")
    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)
