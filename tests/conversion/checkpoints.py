"""Tiny random checkpoints, written without PyTorch."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from prumerge_jax.conversion import keys
from prumerge_jax.conversion.hf_files import adapter_config, clip_config, hf_config, llava_config
from prumerge_jax.conversion.keys import Dialect
from prumerge_jax.conversion.safetensors_io import ShardedWriter
from prumerge_jax.conversion.safetensors_io import encode as encode_safetensors
from prumerge_jax.conversion.tensor_files import TensorInfo
from prumerge_jax.conversion.torch_bin import encode
from prumerge_jax.models.config import LlavaConfig, TextConfig, VisionConfig

TINY = LlavaConfig(
    vision=VisionConfig(
        image_size=28, patch_size=14, width=16, mlp_width=24, num_layers=3, num_heads=2
    ),
    text=TextConfig(
        vocab_size=128, width=24, mlp_width=40, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=6, max_positions=256,
    ),
    image_token_id=100,
    pad_token_id=101,
)  # fmt: skip


def random_tensors(
    config: LlavaConfig = TINY, dtype: str = "bfloat16", seed: int = 0
) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint by canonical key."""
    rng = np.random.default_rng(seed)
    shapes = keys.expected_shapes(keys.weights(config)) | keys.unused_tower_tensors(config)
    return {
        key: rng.normal(size=shape).astype(np.float32).astype(jnp.dtype(dtype))
        for key, shape in shapes.items()
    }


def stacked(weight: keys.Weight, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The weight of ours that these checkpoint tensors become."""
    axes = weight.transform.value
    parts = [tensors[key].transpose(axes) if axes else tensors[key] for key in weight.keys]
    return np.ascontiguousarray(parts[0] if weight.num_layers is None else np.stack(parts))


def split(weight: keys.Weight, ours: np.ndarray) -> dict[str, np.ndarray]:
    """The checkpoint tensors, by canonical key, that a weight of ours was stacked from."""
    parts = [ours] if weight.num_layers is None else ours
    return {
        key: weight.transform.checkpoint_view(part)
        for key, part in zip(weight.keys, parts, strict=True)
    }


def named(
    tensors: Mapping[str, np.ndarray], dialect: Dialect = Dialect.HF, config: LlavaConfig = TINY
) -> dict[str, np.ndarray]:
    """The same tensors under a dialect's names."""
    return {keys.dialect_key(key, dialect, config): a for key, a in tensors.items()}


def write_tensors(
    folder: pathlib.Path, tensors: Mapping[str, np.ndarray], max_shard_bytes: int = 1 << 40
) -> None:
    """Writes model.safetensors, or shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    infos = {key: TensorInfo(array.shape, array.dtype) for key, array in tensors.items()}
    writer = ShardedWriter(folder, infos, max_shard_bytes)
    for key, array in tensors.items():
        writer.write(key, array)
    writer.finish()


def write_hf(
    folder: pathlib.Path, config: LlavaConfig = TINY, dtype: str = "bfloat16", **options: int
) -> dict[str, np.ndarray]:
    """A llava-hf directory; returns its tensors by canonical key."""
    tensors = random_tensors(config, dtype)
    write_tensors(folder, named(tensors, Dialect.HF, config), **options)
    (folder / "config.json").write_text(json.dumps(hf_config(config)))
    return tensors


def write_llava(
    folder: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    config: LlavaConfig,
    *,
    container: str = "safetensors",
    in_file_tower: bool = False,
) -> None:
    """An original LLaVA directory of these canonical tensors, its tower left out by default."""
    kept = {k: a for k, a in tensors.items() if in_file_tower or not k.startswith("vision")}
    write_container(folder, named(kept, Dialect.LLAVA, config), container)
    values = llava_config(config) | {"unfreeze_mm_vision_tower": in_file_tower}
    (folder / "config.json").write_text(json.dumps(values))


def write_container(
    folder: pathlib.Path, tensors: Mapping[str, np.ndarray], container: str
) -> None:
    """Two `.bin` shards with an index, one `.bin`, or safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    if container == "safetensors":
        write_tensors(folder, tensors)
    elif container == "bin":
        (folder / "pytorch_model.bin").write_bytes(encode(tensors))
    else:
        names = list(tensors)
        weight_map = {}
        for shard, part in enumerate((names[::2], names[1::2])):
            file = f"pytorch_model-{shard + 1:05d}-of-00002.bin"
            (folder / file).write_bytes(encode({name: tensors[name] for name in part}))
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def write_clip(
    folder: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    config: LlavaConfig = TINY,
    container: str = "bin",
) -> None:
    """A complete CLIPModel, as the published tower comes, with these canonical tower tensors."""
    tower = {k: a for k, a in tensors.items() if k.startswith("vision_tower.")}
    rest = {
        "logit_scale": np.float32(2.5),
        "text_model.embeddings.token_embedding.weight": np.ones((3, 4), np.float32),
        "text_model.embeddings.position_ids": np.arange(4)[None],
        "visual_projection.weight": np.ones((3, 4), np.float32),
        "text_projection.weight": np.ones((3, 4), np.float32),
        "vision_model.embeddings.position_ids": np.arange(5)[None],
    }
    rest = {key: np.asarray(array) for key, array in rest.items()}
    write_container(folder, named(tower, Dialect.CLIP, config) | rest, container)
    values = {"model_type": "clip", "vision_config": clip_config(config.vision)}
    (folder / "config.json").write_text(json.dumps(values))


def write_llama(
    folder: pathlib.Path,
    tensors: Mapping[str, np.ndarray],
    config: LlavaConfig,
    container: str = "safetensors",
) -> None:
    """A plain LLaMA of these canonical tensors, with the rotary frequencies of old files."""
    decoder = {k: a for k, a in tensors.items() if k.startswith(("language_model.", "lm_head."))}
    own = named(decoder, Dialect.LLAVA, config)
    own["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    write_container(folder, own, container)
    values = {k: v for k, v in llava_config(config).items() if not k.startswith(("mm_", "unf"))}
    values |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(values))


def random_adapter(config: LlavaConfig, rank: int, seed: int = 1) -> dict[str, np.ndarray]:
    """float32 tensors of an adapter on every linear layer, by canonical key."""
    rng = np.random.default_rng(seed)
    shapes = keys.expected_shapes(keys.adapter_weights(config.text, rank))
    return {key: rng.normal(size=shape).astype(np.float32) / 4 for key, shape in shapes.items()}


def write_peft(
    folder: pathlib.Path,
    adapter: Mapping[str, np.ndarray],
    projector: Mapping[str, np.ndarray],
    config: LlavaConfig,
    *,
    container: str = "bin",
    **options: object,
) -> None:
    """A LoRA directory as the published ones are laid out."""
    folder.mkdir(parents=True)
    own = {f"base_model.model.{k}": a for k, a in named(adapter, Dialect.LLAVA, config).items()}
    name = f"adapter_model.{container}"
    writer = encode if container == "bin" else encode_safetensors
    (folder / name).write_bytes(writer(own))
    beside = named(projector, Dialect.LLAVA, config)
    content = encode({f"base_model.model.{key}": array for key, array in beside.items()})
    (folder / "non_lora_trainables.bin").write_bytes(content)
    rank = next(a.shape[0] for k, a in adapter.items() if ".lora_A." in k)
    values = adapter_config(rank, 2 * rank, 0.05, "lmsys/vicuna-7b-v1.5", ["v_proj", "q_proj"])
    (folder / "adapter_config.json").write_text(json.dumps(values | options))
    (folder / "config.json").write_text(
        json.dumps(llava_config(config) | {"unfreeze_mm_vision_tower": False})
    )


def edit_config(folder: pathlib.Path, **changes: object) -> None:
    """Sets fields of config.json; `a__b=x` sets b within a, and ... removes a field."""
    path = folder / "config.json"
    values = json.loads(path.read_text())
    for name, value in changes.items():
        section = values
        *outer, last = name.split("__")
        for part in outer:
            section = section[part]
        if value is ...:
            section.pop(last)
        else:
            section[last] = value
    path.write_text(json.dumps(values))


def original(projector: str = "mlp2x_gelu") -> LlavaConfig:
    """TINY as an original LLaVA has it: no image token in the vocabulary."""
    text = dataclasses.replace(TINY.text, vocab_size=100)
    return dataclasses.replace(
        TINY, text=text, projector=projector, image_token_id=None, pad_token_id=None
    )
