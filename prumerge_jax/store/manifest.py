"""`manifest.json`: what a model directory holds, and whether it still does.

Format version 2 adds the SHA-256 of every weight's content and, as the last field, that of the
manifest itself. Directories of version 1 are read too; their weights are hashed when needed.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from prumerge_jax.store.array_files import ArrayFile
from prumerge_jax.store.atomic import write_atomically
from prumerge_jax.store.errors import DirectoryError
from prumerge_jax.store.strict_json import parse_json, read_bounded

MANIFEST = "manifest.json"
PARAMS = "params"
FORMAT = "prumerge_jax"
FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, 2)

# One entry of some 150 bytes per 32 MB of weights and per file.
MAX_MANIFEST_BYTES = 16 << 20
_SEAL = b',\n "sha256": "%s"\n}\n'

DOTTED_PATH = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """What the manifest says of one weight.

    Attributes:
      shape: layers stacked on the leading axis.
      dtype: as stored; integers of four bits (`int4`, `uint4`) are packed along the last axis.
      sha256: hash of the bytes in C order, hex; None in directories of format version 1.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    sha256: str | None

    def open(self, folder: pathlib.Path, *, is_read_in_parts: bool = False) -> ArrayFile:
        """The file; arguments and errors as of `ArrayFile`."""
        return ArrayFile(folder, self.shape, self.dtype, is_read_in_parts=is_read_in_parts)


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
        """The manifest as `read_manifest` reads it, without its checksum."""
        dtypes = sorted({str(stored.dtype) for stored in self.arrays.values()})
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "dtype": dtypes[0] if len(dtypes) == 1 else dtypes,
            "source": dict(self.source),
            "arrays": {
                path: {
                    "shape": list(stored.shape),
                    "dtype": str(stored.dtype),
                    "sha256": stored.sha256,
                }
                for path, stored in sorted(self.arrays.items())
            },
            "files": {
                name: {"size": size, "sha256": digest}
                for name, (size, digest) in sorted(self.files.items())
            },
        }


def write_manifest(directory: str | os.PathLike[str], manifest: Manifest) -> None:
    """Writes `manifest.json`, its checksum as the last field."""
    text = json.dumps(manifest.to_json(), indent=1, allow_nan=False)
    write_atomically(pathlib.Path(directory) / MANIFEST, seal(text.encode()))


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Parses `manifest.json`.

    Raises:
      DirectoryError: it is missing (the directory was never finished), of another format version,
        altered, malformed, or names files outside the directory.
    """
    path = pathlib.Path(directory) / MANIFEST
    if not path.is_file():
        raise DirectoryError(
            f"{directory} is not a finished model directory: it has no {MANIFEST}; "
            "write it with convert_weights.py"
        )
    try:
        raw = read_bounded(path, MAX_MANIFEST_BYTES)
        sections = parse_json(raw, str(path))
        _check_format(sections, raw, path)
        arrays = {
            name: StoredArray(
                tuple(int(n) for n in entry["shape"]),
                jnp.dtype(entry["dtype"]),
                None if sections["format_version"] == 1 else str(entry["sha256"]),
            )
            for name, entry in sections["arrays"].items()
        }
        files = {
            name: (int(entry["size"]), str(entry["sha256"]))
            for name, entry in sections["files"].items()
        }
        source = dict(sections["source"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DirectoryError(f"{path}: malformed: {error!r:.200}") from None
    except ValueError as error:
        raise DirectoryError(str(error)) from None
    for name in files:
        parts = pathlib.PurePosixPath(name).parts
        if not parts or ".." in parts or name.startswith("/"):
            raise DirectoryError(f"{path}: {name!r:.80} leads out of the directory")
    for name in arrays:
        if not DOTTED_PATH.fullmatch(name):
            raise DirectoryError(f"{path}: {name!r:.80} is not a dotted weight path")
    return Manifest(arrays, files, source)


def weights_identity(directory: str | os.PathLike[str]) -> str:
    """SHA-256 (hex) over path, dtype, shape and content of every weight.

    The same weights have the same identity whenever, wherever and in however many pieces they were
    written; other files of the directory play no part. The manifest is trusted, see `verify`; of a
    directory of format version 1, which lacks the content's hashes, every weight is read.

    Raises:
      DirectoryError: no finished model directory, or a weight cannot be read.
    """
    root = pathlib.Path(directory)
    digest = hashlib.sha256()
    for path, stored in sorted(read_manifest(root).arrays.items()):
        content = stored.sha256 or stored.open(root / PARAMS / path).sha256()
        digest.update(f"{path} {stored.dtype} {list(stored.shape)} {content}\n".encode())
    return digest.hexdigest()


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


def seal(text: bytes) -> bytes:
    """A JSON object with the SHA-256 of its text appended as the last field, `sha256`."""
    body = text.rstrip().removesuffix(b"}").rstrip()
    return body + _SEAL % hashlib.sha256(body).hexdigest().encode()


def _is_intact(sealed: bytes) -> bool:
    """Whether no byte differs from what `seal` returned."""
    body = sealed[: -len(_SEAL % bytes(64))]
    return sealed == body + _SEAL % hashlib.sha256(body).hexdigest().encode()


def _check_format(sections: Mapping[str, Any], raw: bytes, path: pathlib.Path) -> None:
    found, version = sections["format"], sections["format_version"]
    if found != FORMAT or version not in _READABLE_VERSIONS:
        raise DirectoryError(
            f"{path}: format {found!r:.80} version {version!r:.80}; this program reads "
            f"{FORMAT!r} version {FORMAT_VERSION}: convert again"
        )
    if version != 1 and not _is_intact(raw):
        raise DirectoryError(f"{path} was altered: its own checksum differs; convert again")
