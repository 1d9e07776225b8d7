"""LLaVA-1.5: CLIP-L at 336 pixels, one square image, a LLaMA."""

from typing import Any

from prumerge_jax.families.base import Family, ImageProcessor, parse_model
from prumerge_jax.families.fields import Section
from prumerge_jax.families.towers import parse_clip
from prumerge_jax.models.config import LlavaConfig, VisionConfig, published


def parse(top: Section) -> LlavaConfig:
    """The configuration of a `LlavaForConditionalGeneration`.

    Raises:
      ConversionError: a field is malformed, out of bounds, or asks for something unsupported.
    """
    own = top.values.get("vision_config")
    return parse_model(
        top,
        vision=VisionConfig() if own is None else parse_clip(top.section("vision_config")),
        decoders=("llama",),
        feature_layer=-2,
        strategy="default",
        image_token_id=32000,
    )


def fields(config: LlavaConfig) -> dict[str, Any]:
    """`config.json` beyond what all families share."""
    return {"image_seq_length": config.vision.num_patches}


LLAVA_1_5 = Family(
    name="llava_1_5",
    title="LLaVA-1.5",
    architecture="LlavaForConditionalGeneration",
    model_type="llava",
    parse=parse,
    fields=fields,
    processor=ImageProcessor(
        kind="CLIPImageProcessor",
        processor="LlavaProcessor",
        crops=True,
        do_pad=(None, False),
        needs=(),
        expected=lambda vision: {
            # transformers' default is 0, with which one place too few meets the features.
            "num_additional_image_tokens": 1,
            "patch_size": vision.patch_size,
            "vision_feature_select_strategy": "default",
        },
    ),
    image_mode="pad",
    sizes={name: published(name) for name in ("llava-1.5-7b", "llava-1.5-13b")},
)
