"""Checkpoints whose linear layers others have quantised, each kind read by its own rule."""

from prumerge_jax.conversion.packed.base import Codes
from prumerge_jax.conversion.packed.checkpoint import PackedCheckpoint, unpacked, without_packing

__all__ = ["Codes", "PackedCheckpoint", "unpacked", "without_packing"]
