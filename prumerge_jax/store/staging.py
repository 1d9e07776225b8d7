"""A directory that appears whole or not at all."""

import fcntl
import os
import pathlib
import shutil
import types
from typing import Self

from prumerge_jax.store.manifest import DirectoryError


class StagedDirectory:
    """Collects files in `<name>.incomplete` and renames it to `<name>` on a clean exit.

    An exception removes what was written. What a killed process leaves behind is cleared by the
    next one that stages the same directory.

    Attributes:
      final: where the directory will be.
      path: where its files go until then.
    """

    def __init__(self, final: str | os.PathLike[str]) -> None:
        self.final = pathlib.Path(final)
        self.path = self.final.with_name(self.final.name + ".incomplete")

    def __enter__(self) -> Self:
        """Creates the staging directory, empty and locked against other writers.

        Raises:
          DirectoryError: the final directory exists, or another process is writing it.
        """
        if self.final.exists():
            raise DirectoryError(f"{self.final} exists; remove it or name another directory")
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
            if leftover.is_dir():
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
        finally:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
