"""Tiny random LLaVAs in PyTorch, and their weights as ours: the oracle of the model tests."""

import re

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.llava import LlavaModel, abstract_model


def random_torch_llava(config: LlavaConfig, seed: int = 0) -> torch.nn.Module:
    """transformers' LlavaForConditionalGeneration of this geometry, float32, eager attention."""
    torch.manual_seed(seed)
    vision, text = config.vision, config.text
    hf_config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=vision.width,
            intermediate_size=vision.mlp_width,
            num_hidden_layers=vision.num_layers,
            num_attention_heads=vision.num_heads,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            hidden_act=vision.activation,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.width,
            intermediate_size=text.mlp_width,
            num_hidden_layers=text.num_layers,
            num_attention_heads=text.num_heads,
            num_key_value_heads=text.num_kv_heads,
            head_dim=text.head_dim,
            rms_norm_eps=text.rms_norm_eps,
            max_position_embeddings=text.max_positions,
            tie_word_embeddings=False,
        ),
        image_token_index=config.image_token_id,
        vision_feature_layer=-2,
    )
    model = transformers.LlavaForConditionalGeneration._from_config(
        hf_config, attn_implementation="eager"
    ).eval()
    with torch.no_grad():  # the defaults are so small that a wrong branch would hide
        for name, weight in model.named_parameters():
            noise = 0.3 * torch.randn_like(weight) / weight.shape[-1] ** 0.5
            weight.copy_(1 + noise if re.search("norm.*weight", name) else weight + noise * 2)
    return model


def our_state(model: torch.nn.Module, config: LlavaConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """The same weights as a state of ours, by a table independent of the converter's."""
    tensors = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    graphdef, abstract = abstract_model(config)
    flat = {}
    for path, variable in nnx.to_flat_state(abstract):
        array = _lookup(tensors, [str(part) for part in path], config)
        assert array.shape == variable.shape, (path, array.shape, variable.shape)
        flat[path] = variable.replace(jnp.asarray(array, jnp.float32))
    return graphdef, nnx.from_flat_state(flat)


def our_model(model: torch.nn.Module, config: LlavaConfig) -> LlavaModel:
    return nnx.merge(*our_state(model, config))


def _lookup(tensors: dict[str, np.ndarray], path: list[str], config: LlavaConfig) -> np.ndarray:
    part, leaf = path[0], path[-1]
    if part == "projector":
        name = {"linear_0": "linear_1", "linear_2": "linear_2"}[path[1]]
        weight = tensors[_one(tensors, f"multi_modal_projector.{name}.{_suffix(leaf)}")]
    elif part == "vision":
        weight = _vision(tensors, path[1:], config)
    elif path[1] == "layers":
        inner = ".".join(path[2:-1])
        weight = np.stack(
            [
                tensors[_one(tensors, f"language_model.layers.{i}.{inner}.weight")]
                for i in range(config.text.num_layers)
            ]
        )
    elif path[1] == "lm_head":
        weight = tensors[_one(tensors, "lm_head.weight")]
    else:
        weight = tensors[_one(tensors, f"language_model.{path[1]}.weight")]
    if leaf == "kernel" and path[1] != "patch_embedding":
        weight = np.swapaxes(weight, -1, -2)
    return weight


def _vision(tensors: dict[str, np.ndarray], path: list[str], config: LlavaConfig) -> np.ndarray:
    if path == ["class_embedding"]:
        return tensors[_one(tensors, "embeddings.class_embedding")]
    if path == ["position_embedding"]:
        return tensors[_one(tensors, "embeddings.position_embedding.weight")]
    if path[0] == "patch_embedding":
        return tensors[_one(tensors, "patch_embedding.weight")].transpose(2, 3, 1, 0)
    if path[0] == "pre_layernorm":
        return tensors[_one(tensors, f"pre_layrnorm.{_suffix(path[1])}")]
    suffix = _suffix(path[-1])
    if path[0] == "last":
        block = "self_attn." * (path[1] != "layer_norm1") + path[1]
        layer = config.vision.num_layers - 1
        return tensors[_one(tensors, f"encoder.layers.{layer}.{block}.{suffix}")]
    inner = ".".join(path[1:-1])
    return np.stack(
        [
            tensors[_one(tensors, f"encoder.layers.{i}.{inner}.{suffix}")]
            for i in range(config.vision.num_layers - 1)
        ]
    )


def _suffix(leaf: str) -> str:
    return "bias" if leaf == "bias" else "weight"


def _one(tensors: dict[str, np.ndarray], ending: str) -> str:
    (key,) = [k for k in tensors if k.endswith(ending)]
    return key


def with_random_adapters(model: torch.nn.Module, rank: int, alpha: float) -> torch.nn.Module:
    """PEFT's adapters on every linear layer of the language model, none of them zero."""
    import peft  # here, because most tests of this oracle need none

    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=0.0,
            target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
        ),
    )
    torch.manual_seed(1)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide lora_A
            torch.nn.init.normal_(weight, std=0.2)
    return adapted
