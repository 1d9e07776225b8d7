"""Video-LLaVA: a CLIP-L tower at 224 pixels for images and one for videos, a Vicuna."""

import dataclasses
from typing import Any

from prumerge_jax.families.base import Family, ImageProcessor, VideoRule, parse_model
from prumerge_jax.families.fields import Section
from prumerge_jax.families.towers import parse_clip
from prumerge_jax.models.config import LlavaConfig, VisionConfig

_VIDEO = VideoRule(num_frames=8, cls=True)
_CLIP_L_224 = VisionConfig(image_size=224)


def parse(top: Section) -> LlavaConfig:
    """The configuration of a `VideoLlavaForConditionalGeneration`.

    Raises:
      ConversionError: a field is malformed, out of bounds, or asks for something unsupported.
    """
    top.require("add_time_attn", [False])
    own = top.values.get("vision_config")
    return parse_model(
        top,
        vision=_CLIP_L_224 if own is None else parse_clip(top.section("vision_config")),
        decoders=("llama",),
        feature_layer=-2,
        strategy="default",
        image_token_id=32000,
        family="video_llava",
        video_token_id=top.get(["video_token_index", "video_token_id"], int, 32001),
        video_tower=True,
        chat_template="llava_v1",
    )


def fields(config: LlavaConfig) -> dict[str, Any]:
    """`config.json` beyond what all families share."""
    patches = config.vision.num_patches
    return {
        "video_token_index": config.video_token_id,
        "image_seq_length": patches,
        "video_seq_length": _VIDEO.num_frames * (patches + 1),
    }


VIDEO_LLAVA = Family(
    name="video_llava",
    title="Video-LLaVA",
    architecture="VideoLlavaForConditionalGeneration",
    model_type="video_llava",
    parse=parse,
    fields=fields,
    processor=ImageProcessor(
        kind="VideoLlavaImageProcessor",
        processor="VideoLlavaProcessor",
        crops=True,
        do_pad=(None, False),
        needs=("size", "crop_size"),
        expected=lambda vision: {
            # transformers' default is 0, with which one place too few meets the features.
            "num_additional_image_tokens": 1,
            "patch_size": vision.patch_size,
            "vision_feature_select_strategy": "default",
        },
    ),
    image_mode="crop",
    video=_VIDEO,
    towers={"vision": "image_tower", "video_tower": "video_tower"},
    sizes={
        "video-llava-7b": dataclasses.replace(
            LlavaConfig(),
            vision=_CLIP_L_224,
            pad_token_id=32002,
            family="video_llava",
            video_token_id=32001,
            video_tower=True,
            chat_template="llava_v1",
        )
    },
)
