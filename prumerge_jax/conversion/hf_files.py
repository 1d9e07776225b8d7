"""The JSON files next to weights, in the format of the libraries that will read them."""

from typing import Any

from prumerge_jax.conversion.tensor_files import ConversionError
from prumerge_jax.families import family_of
from prumerge_jax.models.config import LlavaConfig, TextConfig, VisionConfig

OPENAI_TOWER = "openai/clip-vit-large-patch14-336"
SIGLIP_TOWER = "google/siglip-so400m-patch14-384"
# Fields of one decoder's configuration alone.
_OWN_FIELDS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
}
# Fields of `config.json` that the image processor must have too.
_SHARED_WITH_PROCESSOR = ("image_grid_pinpoints", "vision_aspect_ratio")
_DECODER_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}


def hf_config(config: LlavaConfig) -> dict[str, Any]:
    """`config.json` of a family's class in transformers, for transformers 4 and 5 alike.

    Raises:
      ConversionError: a projector that transformers' LLaVA does not have, or no image token.
    """
    if config.projector != "mlp2x_gelu":
        raise ConversionError(
            f"projector {config.projector}: llava-hf has mlp2x_gelu only; use --to=llava"
        )
    if config.image_token_id is None:
        raise ConversionError("the model has no image token id, which llava-hf needs")
    family, vision, text = family_of(config), config.vision, config.text
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "image_token_index": config.image_token_id,
        "pad_token_id": config.pad_token_id,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": vision.feature_layer,
        "vision_feature_select_strategy": "default" if vision.cls_token else "full",
        "tie_word_embeddings": text.tied_head,
        **family.fields(config),
        "text_config": {
            "architectures": [_DECODER_CLASSES[text.model_type]],
            "model_type": text.model_type,
            **_text_fields(text),
            **_ends(config),
        },
        "vision_config": clip_config(vision) if vision.cls_token else siglip_config(vision),
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


def _tower_sizes(vision: VisionConfig) -> dict[str, Any]:
    """What the `config.json` of every vision tower says."""
    return {
        "hidden_size": vision.width,
        "intermediate_size": vision.mlp_width,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "num_channels": 3,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "layer_norm_eps": vision.layer_norm_eps,
    }


def clip_config(vision: VisionConfig) -> dict[str, Any]:
    """`config.json` of a CLIPVisionModel."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        **_tower_sizes(vision),
        "hidden_act": vision.activation,
        "projection_dim": 768,
        "vocab_size": 32000,
    }


def siglip_config(vision: VisionConfig) -> dict[str, Any]:
    """`config.json` of a SiglipVisionModel."""
    return {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        **_tower_sizes(vision),
        "hidden_act": "gelu_pytorch_tanh",
        "vision_use_head": False,
    }


def image_processor(config: LlavaConfig) -> dict[str, Any]:
    """`preprocessor_config.json` of the family's image processor."""
    spec, vision = family_of(config).processor, config.vision
    side = vision.image_size
    square = {"height": side, "width": side}
    crop = {"do_center_crop": True, "crop_size": square} if spec.crops else {}
    own = family_of(config).fields(config)
    return {
        "image_processor_type": spec.kind,
        "processor_class": spec.processor,
        "do_resize": True,
        "size": {"shortest_edge": side} if spec.crops else square,
        "resample": 3,
        **crop,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(vision.pixel_mean),
        "image_std": list(vision.pixel_std),
        "do_convert_rgb": True,
        **({"do_pad": spec.do_pad[0]} if spec.do_pad[0] is not None else {}),
        **{name: own[name] for name in _SHARED_WITH_PROCESSOR if name in own},
    }


def processor(config: LlavaConfig) -> dict[str, Any]:
    """`processor_config.json` of the family's processor."""
    spec = family_of(config).processor
    aspect = family_of(config).fields(config).get("vision_aspect_ratio")
    return {
        "processor_class": spec.processor,
        "image_token": "<image>",
        **spec.expected(config.vision),
        **({} if aspect is None else {"vision_aspect_ratio": aspect}),
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
        **_rope_scaling(text),
        "rms_norm_eps": text.rms_norm_eps,
        "max_position_embeddings": text.max_positions,
        "hidden_act": "silu",
        "tie_word_embeddings": text.tied_head,
        **_OWN_FIELDS[text.model_type],
    }


def _rope_scaling(text: TextConfig) -> dict[str, Any]:
    scaling = text.rope_scaling
    if scaling is None:
        return {}
    fields = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        fields |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    return {"rope_scaling": fields}
