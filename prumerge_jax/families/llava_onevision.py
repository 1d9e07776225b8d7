"""LLaVA-OneVision: SigLIP on tiles, several images and videos, a Qwen2."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from prumerge_jax.families.base import (
    Family,
    ImageProcessor,
    VideoRule,
    grid_pinpoints,
    parse_model,
)
from prumerge_jax.families.fields import ConversionError, Section
from prumerge_jax.families.towers import SIGLIP_SO400M, parse_siglip
from prumerge_jax.models.config import LlavaConfig, TextConfig, VisionConfig

PINPOINTS = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]


def parse(top: Section) -> LlavaConfig:
    """The configuration of a `LlavaOnevisionForConditionalGeneration`.

    Raises:
      ConversionError: a field is malformed, out of bounds, or asks for something unsupported.
    """
    own = top.values.get("vision_config")
    vision = SIGLIP_SO400M if own is None else parse_siglip(top.section("vision_config"))
    return parse_model(
        top,
        vision=vision,
        decoders=("qwen2",),
        feature_layer=-1,
        strategy="full",
        image_token_id=151646,
        may_tie=True,
        family="llava_onevision",
        video_token_id=top.get(["video_token_index", "video_token_id"], int, 151647),
        image_newline=True,
        image_grid_pinpoints=grid_pinpoints(top, PINPOINTS, vision.image_size),
        anyres_max=anyres_max(top, "vision_aspect_ratio", "anyres_max_9"),
        chat_template="qwen_1_5",
    )


def anyres_max(section: Section, name: str, default: str) -> int:
    """N of `anyres_max_N`.

    Raises:
      ConversionError: another spelling.
    """
    value = section.get(name, str, default)
    match = re.fullmatch(r"anyres_max_([1-9]\d?)", value)
    if match is None:
        raise ConversionError(
            f"{section.where}: {name} is {value!r:.80}; only 'anyres_max_N' is supported"
        )
    return int(match[1])


def fields(config: LlavaConfig) -> dict[str, Any]:
    """`config.json` beyond what all families share."""
    return {
        "video_token_index": config.video_token_id,
        "image_grid_pinpoints": [list(pair) for pair in config.image_grid_pinpoints],
        "vision_aspect_ratio": f"anyres_max_{config.anyres_max}",
    }


def _processor_fields(vision: VisionConfig) -> Mapping[str, Any]:
    return {
        "num_image_tokens": vision.num_patches,
        "vision_feature_select_strategy": "full",
        "video_token": "<video>",
    }


_QWEN2_7B = TextConfig(
    vocab_size=152128, width=3584, mlp_width=18944, num_layers=28, num_heads=28, num_kv_heads=4,
    head_dim=128, rope_theta=1e6, rms_norm_eps=1e-6, max_positions=32768, qkv_bias=True,
    model_type="qwen2",
)  # fmt: skip
_7B = LlavaConfig(
    vision=SIGLIP_SO400M,
    text=_QWEN2_7B,
    image_token_id=151646,
    pad_token_id=151643,
    bos_token_id=None,
    eos_token_ids=(151645, 151643),
    family="llava_onevision",
    video_token_id=151647,
    image_newline=True,
    image_grid_pinpoints=tuple((height, width) for height, width in PINPOINTS),
    anyres_max=9,
    chat_template="qwen_1_5",
)
_QWEN2_05B = dataclasses.replace(
    _QWEN2_7B, vocab_size=152000, width=896, mlp_width=4864, num_layers=24, num_heads=14,
    num_kv_heads=2, head_dim=64, tied_head=True,
)  # fmt: skip

LLAVA_ONEVISION = Family(
    name="llava_onevision",
    title="LLaVA-OneVision",
    architecture="LlavaOnevisionForConditionalGeneration",
    model_type="llava_onevision",
    parse=parse,
    fields=fields,
    processor=ImageProcessor(
        kind="LlavaOnevisionImageProcessor",
        processor="LlavaOnevisionProcessor",
        crops=False,
        do_pad=(True, None),
        needs=("size", "image_mean", "image_std"),
        expected=_processor_fields,
    ),
    image_mode="anyres",
    video=VideoRule(num_frames=32, squeezed=True, pooling=2),
    sizes={
        "llava-onevision-0.5b": dataclasses.replace(_7B, text=_QWEN2_05B),
        "llava-onevision-7b": _7B,
    },
)
