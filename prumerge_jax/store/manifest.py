"""`manifest.json`: what a model directory holds, and whether it still does."""

import dataclasses
import hashlib
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from prumerge_jax.store.strict_json import load_json

MANIFEST = "manifest.json"
PARAMS = "params"
FORMAT = "prumerge_jax"
FORMAT_VERSION = 1

DOTTED_PATH = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")


class DirectoryError(ValueError):
    """A model directory is incomplete, damaged, or not what was asked for."""


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """What the manifest says of one weight."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`.

    Attributes:
      arrays: every weight by dotted path.
      files: size in bytes and SHA-256 of every other file of the directory, by relative path.
      source: where the weights came from, free-form facts.
    """

    arrays: Mapping[str, StoredArray]
    files: Mapping[str, tuple[int, str]]
    source: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The manifest as `read_manifest` reads it."""
        dtypes = sorted({str(stored.dtype) for stored in self.arrays.values()})
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "dtype": dtypes[0] if len(dtypes) == 1 else dtypes,
            "source": dict(self.source),
            "arrays": {
                path: {"shape": list(stored.shape), "dtype": str(stored.dtype)}
                for path, stored in sorted(self.arrays.items())
            },
            "files": {
                name: {"size": size, "sha256": digest}
                for name, (size, digest) in sorted(self.files.items())
            },
        }


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Parses `manifest.json`.

    Raises:
      DirectoryError: it is missing (the directory was never finished), of another format version,
        malformed, or names files outside the directory.
    """
    path = pathlib.Path(directory) / MANIFEST
    if not path.is_file():
        raise DirectoryError(
            f"{directory} is not a finished model directory: it has no {MANIFEST}; "
            "write it with convert_weights.py"
        )
    try:
        sections = load_json(path, max_bytes=256 << 20)
        _check_format(sections, path)
        arrays = {
            name: StoredArray(tuple(int(n) for n in entry["shape"]), jnp.dtype(entry["dtype"]))
            for name, entry in sections["arrays"].items()
        }
        files = {
            name: (int(entry["size"]), str(entry["sha256"]))
            for name, entry in sections["files"].items()
        }
        source = dict(sections["source"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DirectoryError(f"{path}: malformed: {error!r}") from None
    for name in files:
        parts = pathlib.PurePosixPath(name).parts
        if not parts or ".." in parts or name.startswith("/"):
            raise DirectoryError(f"{path}: {name!r} leads out of the directory")
    for name in arrays:
        if not DOTTED_PATH.fullmatch(name):
            raise DirectoryError(f"{path}: {name!r} is not a dotted weight path")
    return Manifest(arrays, files, source)


def verify(directory: str | os.PathLike[str], *, hashes: bool = True) -> None:
    """Compares every file with the manifest: its size, and its SHA-256 unless `hashes` is False.

    Raises:
      DirectoryError: a file is missing, truncated, altered, a link, or, among the weights, not in
        the manifest; the message names it.
    """
    root = pathlib.Path(directory)
    manifest = read_manifest(root)
    for name, (size, _) in manifest.files.items():
        file = root / name
        if file.is_symlink() or not file.is_file():
            raise DirectoryError(f"{file} is missing or not a plain file; convert again")
        if file.stat().st_size != size:
            raise DirectoryError(
                f"{file} has {file.stat().st_size} bytes, the manifest says {size}; convert again"
            )
    for file in (root / PARAMS).rglob("*"):
        if file.is_file() and file.relative_to(root).as_posix() not in manifest.files:
            raise DirectoryError(f"{file} is not in the manifest; remove it")
    if hashes:
        for name, (_, digest) in manifest.files.items():
            if size_and_sha256(root / name)[1] != digest:
                raise DirectoryError(
                    f"{root / name} was altered: its SHA-256 differs from the manifest's; "
                    "convert again"
                )


def size_and_sha256(file: pathlib.Path) -> tuple[int, str]:
    """Size in bytes and SHA-256 (hex) of one file."""
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return file.stat().st_size, digest


def _check_format(sections: Mapping[str, Any], path: pathlib.Path) -> None:
    found = sections["format"], sections["format_version"]
    if found != (FORMAT, FORMAT_VERSION):
        raise DirectoryError(
            f"{path}: format {found[0]!r} version {found[1]!r}; "
            f"this program reads {FORMAT!r} version {FORMAT_VERSION}: convert again"
        )
