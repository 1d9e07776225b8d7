"""Files and directories that appear complete or not at all."""

import contextlib
import fcntl
import os
import pathlib
import shutil
import types
from typing import Self

from prumerge_jax.store.errors import DirectoryError

_INCOMPLETE = ".incomplete"


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file so that a crash leaves the old one or the complete new one, never a part.

    The content goes to `<name>.incomplete` in the same folder, reaches the disk, and is renamed
    into place. A failure removes it; what a killed process leaves is overwritten by the next write.

    Raises:
      OSError: the folder is missing, not writable or full; the file is as it was.
    """
    final = pathlib.Path(path)
    incomplete = final.with_name(final.name + _INCOMPLETE)
    try:
        with open(incomplete, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        incomplete.replace(final)
    except BaseException:
        incomplete.unlink(missing_ok=True)
        raise
    sync_folder(final.parent)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Makes what was created, renamed or removed in a folder survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_new(path: str | os.PathLike[str]) -> None:
    """Raises a DirectoryError if there is anything at `path`."""
    if os.path.lexists(path):
        raise DirectoryError(f"{path} exists; remove it or name another directory")


def require_space(path: str | os.PathLike[str], nbytes: int) -> None:
    """Raises a DirectoryError if the disk of a path to be written has fewer free bytes."""
    folder = next(parent for parent in pathlib.Path(path).absolute().parents if parent.exists())
    if nbytes > (free := shutil.disk_usage(folder).free):
        raise DirectoryError(
            f"{path} needs {nbytes / 1e9:.3g} GB, the disk has {free / 1e9:.3g} GB left; make room "
            "or name a directory elsewhere"
        )


class StagedDirectory:
    """Collects files in `<name>.incomplete` and renames it to `<name>` on a clean exit.

    An exception removes what was written, new parent folders included. What a killed process
    leaves is cleared by the next one that stages the same directory.

    Attributes:
      final: where the directory will be.
      path: where its files go until then.
    """

    def __init__(self, final: str | os.PathLike[str]) -> None:
        self.final = pathlib.Path(final)
        self.path = self.final.with_name(self.final.name + _INCOMPLETE)

    def __enter__(self) -> Self:
        """Creates the staging directory, empty and locked against other writers.

        Raises:
          DirectoryError: the final directory exists, or another process is writing it.
        """
        require_new(self.final)
        self._new_parents = [p for p in self.final.parents if not p.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The writer that held the lock until now may have renamed or removed what was opened.
            if not os.path.samestat(os.fstat(self._lock), os.stat(self.path)):
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            os.close(self._lock)
            raise DirectoryError(f"{self.final} is being written by another process") from None
        for leftover in self.path.iterdir():
            if leftover.is_dir() and not leftover.is_symlink():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        """Renames into place, or removes everything where an exception is under way."""
        try:
            if kind is None:
                os.rename(self.path, self.final)
                sync_folder(self.final.parent)
        finally:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            with contextlib.suppress(OSError):  # not empty: committed, or in use by others
                for parent in self._new_parents:
                    parent.rmdir()
