"""Vision towers by `model_type`: CLIP and SigLIP are one class with different defaults."""

from prumerge_jax.families.fields import Section, built
from prumerge_jax.models.config import VisionConfig

SIGLIP_SO400M = VisionConfig(
    image_size=384, patch_size=14, width=1152, mlp_width=4304, num_layers=26, num_heads=16,
    layer_norm_eps=1e-6, activation="gelu_tanh", pixel_mean=(0.5, 0.5, 0.5),
    pixel_std=(0.5, 0.5, 0.5), cls_token=False, pre_norm=False, patch_bias=True, feature_layer=-1,
    attention="received",
)  # fmt: skip
"""google/siglip-so400m-patch14-384 without its last layer and its head, as LLaVA uses it."""


def parse_clip(section: Section) -> VisionConfig:
    """The fields of a CLIPVisionConfig; absent ones have its defaults, which are not CLIP-L's.

    Raises:
      ConversionError: a field is malformed, out of bounds, or asks for something unsupported.
    """
    section.require("model_type", ["clip_vision_model", "clip"])
    section.require("num_channels", [3])
    section.require("add_time_attn", [False])
    return built(
        VisionConfig,
        section.where,
        image_size=section.get("image_size", int, 224),
        patch_size=section.get("patch_size", int, 32),
        width=section.get("hidden_size", int, 768),
        mlp_width=section.get("intermediate_size", int, 3072),
        num_layers=section.get("num_hidden_layers", int, 12),
        num_heads=section.get("num_attention_heads", int, 12),
        layer_norm_eps=float(section.get("layer_norm_eps", float, 1e-5)),
        activation=section.require("hidden_act", ("quick_gelu", "gelu")),
    )


def parse_siglip(section: Section) -> VisionConfig:
    """The fields of a SiglipVisionConfig; absent ones have its defaults, which are the base size.

    Raises:
      ConversionError: as `parse_clip`.
    """
    section.require("model_type", ["siglip_vision_model"])
    section.require("num_channels", [3])
    section.require("hidden_act", ["gelu_pytorch_tanh"])
    # Its tensors would be left over: no language model reads the pooled image.
    section.require("vision_use_head", [False], default=True)
    return built(
        VisionConfig,
        section.where,
        image_size=section.get("image_size", int, 224),
        patch_size=section.get("patch_size", int, 16),
        width=section.get("hidden_size", int, 768),
        mlp_width=section.get("intermediate_size", int, 3072),
        num_layers=section.get("num_hidden_layers", int, 12),
        num_heads=section.get("num_attention_heads", int, 12),
        layer_norm_eps=float(section.get("layer_norm_eps", float, 1e-6)),
        activation="gelu_tanh",
        pixel_mean=SIGLIP_SO400M.pixel_mean,
        pixel_std=SIGLIP_SO400M.pixel_std,
        cls_token=False,
        pre_norm=False,
        patch_bias=True,
        feature_layer=-1,
        attention=SIGLIP_SO400M.attention,
    )
