"""LLaVA with adaptive visual token reduction (PruMerge, arXiv 2403.15388) in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prumerge_jax.data.images import Video as Video
    from prumerge_jax.data.images import VideoFile as VideoFile
    from prumerge_jax.engine.request import Answer as Answer
    from prumerge_jax.engine.request import Request as Request
    from prumerge_jax.engine.request import SamplingParams as SamplingParams
    from prumerge_jax.llava import Llava as Llava

__all__ = ["Answer", "Llava", "Request", "SamplingParams", "Video", "VideoFile"]

_HOMES = {
    "Answer": "prumerge_jax.engine.request",
    "Llava": "prumerge_jax.llava",
    "Request": "prumerge_jax.engine.request",
    "SamplingParams": "prumerge_jax.engine.request",
    "Video": "prumerge_jax.data.images",
    "VideoFile": "prumerge_jax.data.images",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: `prumerge_jax.prumerge` alone needs neither a tokenizer nor Orbax.
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
