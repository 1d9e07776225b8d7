"""The small LLaVA that comes with the package, by its names.

`miniature` is stored in `prumerge_jax/miniature/` as a llava-hf checkpoint in float16, which
transformers can read too; `miniature-any-budget` is the same with the PEFT adapter of its folder
`any_budget` merged, which was trained to read any number of visual tokens.
"""

import hashlib
import os
import pathlib

import numpy as np

from prumerge_jax.conversion.checkpoint_reader import Sources, open_model
from prumerge_jax.conversion.convert import convert
from prumerge_jax.store.manifest import MANIFEST, size_and_sha256
from prumerge_jax.store.model_directory import DirectoryError

NAME = "miniature"
ANY_BUDGET = "miniature-any-budget"

_SHIPPED = pathlib.Path(__file__).parents[1] / NAME
_ADAPTER = _SHIPPED / "any_budget"
_SOURCES = {
    NAME: Sources(_SHIPPED),
    ANY_BUDGET: Sources(_SHIPPED, adapter=_ADAPTER, merge=True),
}
_WEIGHTS = {
    NAME: [_SHIPPED / "model.safetensors"],
    ANY_BUDGET: [_SHIPPED / "model.safetensors", _ADAPTER / "adapter_model.safetensors"],
}


def model_directory(
    checkpoint: str | os.PathLike[str],
    cache: str | os.PathLike[str] = "~/.cache/prumerge_jax",
) -> pathlib.Path:
    """The model directory that a command line names.

    Args:
      checkpoint: a path, or the name of a shipped model.
      cache: where a shipped one is unpacked on first use; float32, some 3 MB.
    """
    name = os.fspath(checkpoint)
    if name not in _SOURCES:
        return pathlib.Path(checkpoint).expanduser()
    directory = pathlib.Path(cache).expanduser() / f"{name}-{_digest(_WEIGHTS[name])[:12]}"
    if not (directory / MANIFEST).exists():
        try:
            convert(open_model(_SOURCES[name]), directory, dtype=np.dtype(np.float32))
        except DirectoryError:
            if not (directory / MANIFEST).exists():  # no other process has unpacked it
                raise
    return directory


def _digest(files: list[pathlib.Path]) -> str:
    first, *others = (size_and_sha256(file)[1] for file in files)
    return hashlib.sha256("".join([first, *others]).encode()).hexdigest() if others else first
