"""The relatives of LLaVA-1.5, one file each: what a checkpoint of theirs says and holds."""

from prumerge_jax.families.base import Family, VideoRule
from prumerge_jax.families.fields import ConversionError
from prumerge_jax.families.registry import FAMILIES, family_of, find, published

__all__ = ["FAMILIES", "ConversionError", "Family", "VideoRule", "family_of", "find", "published"]
