"""All families, by name, by what a checkpoint's `config.json` says, and their sizes."""

from collections.abc import Mapping
from typing import Any

from prumerge_jax.families.base import Family
from prumerge_jax.families.llava_1_5 import LLAVA_1_5
from prumerge_jax.families.llava_next import LLAVA_NEXT
from prumerge_jax.families.llava_onevision import LLAVA_ONEVISION
from prumerge_jax.families.video_llava import VIDEO_LLAVA
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.config import published as miniature_or_1_5

FAMILIES: Mapping[str, Family] = {
    family.name: family for family in (LLAVA_1_5, LLAVA_NEXT, LLAVA_ONEVISION, VIDEO_LLAVA)
}


def family_of(config: LlavaConfig) -> Family:
    """The family of a configuration.

    Raises:
      ValueError: there is none of this name.
    """
    if config.family not in FAMILIES:
        raise ValueError(f"unknown family {config.family!r:.80}; expected one of {list(FAMILIES)}")
    return FAMILIES[config.family]


def find(fields: Mapping[str, Any]) -> Family | None:
    """The family that a `config.json` of transformers names, by `architectures`, else by
    `model_type`; None where it names none.

    `model_type` alone says nothing of LLaVA-1.5: LLaVA's original files have the same.
    """
    architectures = fields.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    for family in FAMILIES.values():
        if family.architecture in named:
            return family
    if named or not isinstance(fields.get("text_config"), dict):
        return None
    by_type = {family.model_type: family for family in FAMILIES.values()}
    return by_type.get(str(fields.get("model_type", LLAVA_1_5.model_type)))


def published(name: str) -> LlavaConfig:
    """The configuration of a named size, of any family, or `tiny` (for tests).

    Raises:
      ValueError: the name is not one of these.
    """
    sizes = {size: config for f in FAMILIES.values() for size, config in f.sizes.items()}
    sizes["tiny"] = miniature_or_1_5("tiny")
    if name not in sizes:
        raise ValueError(f"unknown model size {name!r}; expected one of {sorted(sizes)}")
    return sizes[name]
