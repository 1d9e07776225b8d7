"""The small LLaVA that comes with the package, by its name: `miniature`.

It is stored in `prumerge_jax/miniature/` as a llava-hf checkpoint in float16, which transformers
can read too.
"""

import os
import pathlib

import numpy as np

from prumerge_jax.conversion.checkpoint_reader import Sources, open_model
from prumerge_jax.conversion.convert import convert
from prumerge_jax.store.manifest import MANIFEST, size_and_sha256
from prumerge_jax.store.model_directory import DirectoryError

NAME = "miniature"

_SHIPPED = pathlib.Path(__file__).parents[1] / NAME


def model_directory(
    checkpoint: str | os.PathLike[str],
    cache: str | os.PathLike[str] = "~/.cache/prumerge_jax",
) -> pathlib.Path:
    """The model directory that a command line names.

    Args:
      checkpoint: a path, or `miniature` for the shipped one.
      cache: where the shipped one is unpacked on first use; float32, some 3 MB.
    """
    if os.fspath(checkpoint) != NAME:
        return pathlib.Path(checkpoint).expanduser()
    _, digest = size_and_sha256(_SHIPPED / "model.safetensors")
    directory = pathlib.Path(cache).expanduser() / f"{NAME}-{digest[:12]}"
    if not (directory / MANIFEST).exists():
        try:
            convert(open_model(Sources(_SHIPPED)), directory, dtype=np.dtype(np.float32))
        except DirectoryError:
            if not (directory / MANIFEST).exists():  # no other process has unpacked it
                raise
    return directory
