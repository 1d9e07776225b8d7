"""The JSON files next to weights, in the format of the libraries that will read them."""

from typing import Any

from prumerge_jax.conversion.tensor_files import ConversionError
from prumerge_jax.models.config import LlavaConfig, TextConfig, VisionConfig

OPENAI_TOWER = "openai/clip-vit-large-patch14-336"


def hf_config(config: LlavaConfig) -> dict[str, Any]:
    """`config.json` of a LlavaForConditionalGeneration, for transformers 4 and 5 alike.

    Raises:
      ConversionError: a projector that transformers' LLaVA does not have, or no image token.
    """
    if config.projector != "mlp2x_gelu":
        raise ConversionError(
            f"projector {config.projector}: llava-hf has mlp2x_gelu only; use --to=llava"
        )
    if config.image_token_id is None:
        raise ConversionError("the model has no image token id, which llava-hf needs")
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": config.image_token_id,
        "image_seq_length": config.vision.num_patches,
        "pad_token_id": config.pad_token_id,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **_text_fields(config.text),
            **_ends(config),
        },
        "vision_config": clip_config(config.vision),
    }


def llava_config(config: LlavaConfig) -> dict[str, Any]:
    """`config.json` of a LlavaLlamaForCausalLM that holds its vision tower."""
    return {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        **_text_fields(config.text),
        **_ends(config),
        "pad_token_id": 0,
        "mm_vision_tower": OPENAI_TOWER,
        # The weights of the tower are in the checkpoint and are to be used.
        "unfreeze_mm_vision_tower": True,
        "mm_projector_type": config.projector,
        "mm_hidden_size": config.vision.width,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
        "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": min(2048, config.text.max_positions),
    }


def clip_config(vision: VisionConfig) -> dict[str, Any]:
    """`config.json` of a CLIPVisionModel."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp_width,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "layer_norm_eps": vision.layer_norm_eps,
        "hidden_act": vision.activation,
        "projection_dim": 768,
        "vocab_size": 32000,
    }


def image_processor(vision: VisionConfig) -> dict[str, Any]:
    """`preprocessor_config.json` of a CLIPImageProcessor."""
    side = vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.pixel_mean),
        "image_std": list(vision.pixel_std),
        "do_convert_rgb": True,
    }


def llava_processor(vision: VisionConfig) -> dict[str, Any]:
    """`processor_config.json` of a LlavaProcessor."""
    return {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": "default",
    }


def tokenizer_config(config: LlavaConfig) -> dict[str, Any]:
    """`tokenizer_config.json` of LLaMA's tokenizer, with llava-hf's tokens where it has them."""
    tokens = {0: "<unk>", 1: "<s>", 2: "</s>"}
    fields: dict[str, Any] = {"pad_token": "<unk>", "padding_side": "right"}
    if config.image_token_id is not None:
        tokens[config.image_token_id] = "<image>"
        fields = {"padding_side": "left", "image_token": "<image>"}
        fields["extra_special_tokens"] = {"image_token": "<image>"}
        fields["processor_class"] = "LlavaProcessor"
        if config.pad_token_id is not None:
            tokens[config.pad_token_id] = fields["pad_token"] = "<pad>"
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": config.text.max_positions,
        **fields,
        "added_tokens_decoder": {
            str(number): {
                "content": content,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for number, content in sorted(tokens.items())
        },
    }


def generation_config(config: LlavaConfig) -> dict[str, Any]:
    """`generation_config.json`."""
    pad = 0 if config.pad_token_id is None else config.pad_token_id
    return {**_ends(config), "pad_token_id": pad}


def adapter_config(
    rank: int, alpha: float, dropout: float, base: str | None, target_modules: str | list[str]
) -> dict[str, Any]:
    """`adapter_config.json` of PEFT."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": target_modules,
    }


def _ends(config: LlavaConfig) -> dict[str, Any]:
    stops: int | list[int] = list(config.eos_token_ids)
    if len(config.eos_token_ids) == 1:
        (stops,) = config.eos_token_ids
    return {"bos_token_id": config.bos_token_id, "eos_token_id": stops}


def _text_fields(text: TextConfig) -> dict[str, Any]:
    return {
        "vocab_size": text.vocab_size,
        "hidden_size": text.width,
        "intermediate_size": text.mlp_width,
        "num_hidden_layers": text.num_layers,
        "num_attention_heads": text.num_heads,
        "num_key_value_heads": text.num_kv_heads,
        "head_dim": text.head_dim,
        "rope_theta": text.rope_theta,
        "rms_norm_eps": text.rms_norm_eps,
        "max_position_embeddings": text.max_positions,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    }
