"""LLaVA with adaptive visual token reduction (PruMerge, arXiv 2403.15388) in JAX."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prumerge_jax.llava import Llava as Llava

__all__ = ["Llava"]


def __getattr__(name: str) -> Any:
    # Imported on first use: `prumerge_jax.prumerge` alone needs neither a tokenizer nor Orbax.
    if name == "Llava":
        from prumerge_jax.llava import Llava

        return Llava
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
