"""What a directory holds, decided by its files and never by its name."""

import dataclasses
import enum
import pathlib
from typing import Any

from prumerge_jax import families
from prumerge_jax.conversion.hf_config import ORIGINALS, VIDEO_LLAVA_TOWERS
from prumerge_jax.conversion.input_folder import check_folder, hub_cache_hint
from prumerge_jax.conversion.tensor_files import ConversionError, load_object
from prumerge_jax.families import Family
from prumerge_jax.store.manifest import FORMAT, MANIFEST, MAX_MANIFEST_BYTES


class Kind(enum.Enum):
    """The kinds of directory that conversion can read."""

    OURS = "a model directory of this package"
    HF = "a checkpoint of transformers (llava-hf)"
    LLAVA = "an original LLaVA checkpoint (LlavaLlamaForCausalLM)"
    LLAMA = "a plain LLaMA or Vicuna"
    PEFT = "a LoRA adapter directory of PEFT"
    PROJECTOR = "a stage-1 directory with nothing but a projector"
    CLIP = "a CLIP model"


@dataclasses.dataclass(frozen=True)
class Detection:
    """What was found and the file or field that says so; of an HF checkpoint also its family."""

    kind: Kind
    reason: str
    family: Family | None = None


# Families with the same kinds of files that need another model than this package has.
_UNSUPPORTED_ARCHITECTURES = {
    "LlavaNextVideo": "LLaVA-NeXT-Video",
    "LlavaMpt": "LLaVA on MPT",
    "LlavaGemma": "LLaVA on Gemma",
    "LlavaMixtral": "LLaVA on Mixtral",
}


def detect(folder: pathlib.Path) -> Detection:
    """Says what a directory holds.

    Raises:
      ConversionError: nothing that can be converted; the message says what was looked for, or
        which unsupported family it is.
    """
    check_folder(folder)
    if (folder / MANIFEST).is_file():
        manifest = load_object(folder / MANIFEST, max_bytes=MAX_MANIFEST_BYTES)
        if manifest.get("format") == FORMAT:
            return Detection(Kind.OURS, f"{MANIFEST} has format {FORMAT}")
    if (folder / "adapter_config.json").is_file():
        return Detection(Kind.PEFT, "it holds adapter_config.json")
    if not (folder / "config.json").is_file():
        hint = hub_cache_hint(folder) or "not a checkpoint that can be converted"
        raise ConversionError(
            f"{folder} holds none of {MANIFEST}, adapter_config.json, config.json: {hint}"
        )
    config = load_object(folder / "config.json")
    _refuse_other_families(config, folder)
    if (folder / "mm_projector.bin").is_file() and not _has_weights(folder):
        return Detection(Kind.PROJECTOR, "it holds mm_projector.bin and no other weights")
    return _by_config(config, folder)


def _by_config(config: dict[str, Any], folder: pathlib.Path) -> Detection:
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    family = families.find(config)
    if family is not None and family.architecture in names:
        return Detection(Kind.HF, f"config.json names {family.architecture}", family)
    if config.get(VIDEO_LLAVA_TOWERS[0]):
        return Detection(Kind.LLAVA, f"config.json has {' and '.join(VIDEO_LLAVA_TOWERS)}")
    if (own := [name for name in names if name in ORIGINALS]) or "mm_vision_tower" in config:
        sign = f"names {own[0]}" if own else "has mm_vision_tower"
        return Detection(Kind.LLAVA, f"config.json {sign}")
    model_type = config.get("model_type")
    if model_type in ("clip", "clip_vision_model"):
        return Detection(Kind.CLIP, f"config.json has model_type {model_type}")
    if family is not None and "text_config" in config and "vision_config" in config:
        sign = f"has text_config and vision_config, of {family.title}"
        return Detection(Kind.HF, f"config.json {sign}", family)
    if "LlamaForCausalLM" in names or model_type == "llama":
        return Detection(Kind.LLAMA, "config.json describes a LlamaForCausalLM")
    raise ConversionError(
        f"{folder / 'config.json'}: architectures {str(architectures)[:80]}, model_type "
        f"{str(model_type)[:80]}: none of "
        f"{', '.join(family.title for family in families.FAMILIES.values())}, LLaMA, CLIP"
    )


def _refuse_other_families(config: dict[str, Any], folder: pathlib.Path) -> None:
    where = folder / "config.json"
    architectures = config.get("architectures")
    for name in architectures if isinstance(architectures, list) else []:
        for prefix, family in _UNSUPPORTED_ARCHITECTURES.items():
            if isinstance(name, str) and name.startswith(prefix):
                raise ConversionError(f"{where}: {name[:80]} is {family}, which is not supported")
    if config.get("mm_vision_resampler"):
        raise ConversionError(
            f"{where}: mm_vision_resampler says a LLaVA with a resampler, which is not supported"
        )
    towers = [name for name in VIDEO_LLAVA_TOWERS if config.get(name)]
    if len(towers) == 1:
        (missing,) = set(VIDEO_LLAVA_TOWERS) - set(towers)
        raise ConversionError(
            f"{where}: {towers[0]} says Video-LLaVA, but there is no {missing}; only both towers "
            "together are supported"
        )


def _has_weights(folder: pathlib.Path) -> bool:
    patterns = ("*.safetensors", "pytorch_model*.bin", "*.safetensors.index.json")
    return any(True for pattern in patterns for _ in folder.glob(pattern))
