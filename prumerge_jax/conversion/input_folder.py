"""Directories that a user names: nothing outside of them is read, and a hub cache is explained."""

import pathlib

from prumerge_jax.conversion.tensor_files import ConversionError, listing

# Names of the files that conversion may read or copy.
_READ = {".json", ".safetensors", ".bin", ".model", ".jinja"}


def check_folder(folder: pathlib.Path) -> None:
    """Checks that a directory exists and that the files in it are in it.

    A downloaded checkpoint with a link to a private file would carry that file into the output.
    In a snapshot of a Hugging Face cache (`models--*/snapshots/COMMIT/`) links into its
    `blobs/` are what the cache consists of.

    Raises:
      ConversionError: it is not a directory, or a link leads out of it; the message names it.
      OSError: it cannot be read.
    """
    if not folder.is_dir():
        raise ConversionError(f"{folder} is not a directory")
    root = folder.resolve()
    inside = [root]
    if root.parent.name == "snapshots" and root.parents[1].name.startswith("models--"):
        inside.append(root.parents[1] / "blobs")
    for file in sorted(folder.iterdir()):
        if not file.is_symlink() or file.suffix not in _READ:
            continue
        target = file.resolve()
        if not any(target.is_relative_to(place) for place in inside):
            raise ConversionError(
                f"{folder / file.name[:80]} is a link that leads out of its directory; "
                "put a copy of the file in its place if you trust it"
            )


def hub_cache_hint(folder: pathlib.Path) -> str | None:
    """Which directory to give instead, if this one is a part of a Hugging Face cache."""
    commits = folder if folder.name == "snapshots" else folder / "snapshots"
    if commits.is_dir():
        found = sorted(str(path.relative_to(folder)) for path in commits.iterdir() if path.is_dir())
        return (
            f"it is a Hugging Face cache; give one of its snapshots/COMMIT directories: "
            f"{listing(found, limit=3) or 'it has none, so the download was not finished'}"
        )
    if models := sorted(
        str(path.relative_to(folder)) for path in folder.glob("models--*/snapshots/*")
    ):
        return (
            "it is a Hugging Face cache of several models; give one of their snapshots/COMMIT "
            f"directories: {listing(models, limit=3)}"
        )
    return None
