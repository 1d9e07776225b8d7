"""LLaVA-NeXT (v1.6): CLIP-L on tiles of an image at one of several resolutions, a newline token."""

import dataclasses
from typing import Any

from prumerge_jax.families.base import Family, ImageProcessor, grid_pinpoints, parse_model
from prumerge_jax.families.fields import Section
from prumerge_jax.families.towers import parse_clip
from prumerge_jax.models.config import LlavaConfig, TextConfig, VisionConfig, published

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_LLAMA_3_ROWS = 128256  # of the vocabulary without <image> and <pad>
_YI_ROWS = 64000


def parse(top: Section) -> LlavaConfig:
    """The configuration of a `LlavaNextForConditionalGeneration`.

    Raises:
      ConversionError: a field is malformed, out of bounds, or asks for something unsupported.
    """
    top.require("use_image_newline_parameter", [True])
    own = top.values.get("vision_config")
    vision = VisionConfig() if own is None else parse_clip(top.section("vision_config"))
    config = parse_model(
        top,
        vision=vision,
        decoders=("llama", "mistral"),
        feature_layer=-2,
        strategy="default",
        image_token_id=32000,
        family="llava_next",
        image_newline=True,
        image_grid_pinpoints=grid_pinpoints(top, PINPOINTS, vision.image_size),
    )
    return dataclasses.replace(config, chat_template=chat_template(config.text))


def chat_template(text: TextConfig) -> str | None:
    """The template of the published models with this decoder; None where it is not known."""
    if text.model_type == "mistral":
        return "mistral_instruct"
    if text.vocab_size >= _LLAMA_3_ROWS:
        return "llava_llama_3"
    return "vicuna_v1" if text.vocab_size < _YI_ROWS else None


def fields(config: LlavaConfig) -> dict[str, Any]:
    """`config.json` beyond what all families share."""
    return {
        "image_seq_length": config.vision.num_patches,
        "image_grid_pinpoints": [list(pair) for pair in config.image_grid_pinpoints],
        "use_image_newline_parameter": True,
    }


_VICUNA_7B = LlavaConfig(
    family="llava_next",
    image_newline=True,
    image_grid_pinpoints=tuple((height, width) for height, width in PINPOINTS),
)
_MISTRAL = TextConfig(
    mlp_width=14336, num_kv_heads=8, rope_theta=1e6, max_positions=32768, model_type="mistral"
)
_LLAMA_3 = TextConfig(
    vocab_size=128320, mlp_width=14336, num_kv_heads=8, rope_theta=5e5, max_positions=8192
)

LLAVA_NEXT = Family(
    name="llava_next",
    title="LLaVA-NeXT",
    architecture="LlavaNextForConditionalGeneration",
    model_type="llava_next",
    parse=parse,
    fields=fields,
    processor=ImageProcessor(
        kind="LlavaNextImageProcessor",
        processor="LlavaNextProcessor",
        crops=True,
        do_pad=(True,),
        needs=("size", "crop_size"),
        expected=lambda vision: {
            # transformers' default is 0, with which one place too few meets the features.
            "num_additional_image_tokens": 1,
            "patch_size": vision.patch_size,
            "vision_feature_select_strategy": "default",
        },
    ),
    image_mode="anyres",
    sizes={
        "llava-next-vicuna-7b": _VICUNA_7B,
        "llava-next-vicuna-13b": dataclasses.replace(
            _VICUNA_7B, text=published("llava-1.5-13b").text
        ),
        "llava-next-mistral-7b": dataclasses.replace(
            _VICUNA_7B, text=_MISTRAL, chat_template="mistral_instruct"
        ),
        "llava-next-llama3-8b": dataclasses.replace(
            _VICUNA_7B,
            text=_LLAMA_3,
            image_token_id=128256,
            pad_token_id=128257,
            bos_token_id=128000,
            eos_token_ids=(128001, 128009),
            chat_template="llava_llama_3",
        ),
    },
)
