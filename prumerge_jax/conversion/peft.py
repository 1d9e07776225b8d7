"""Low-rank adapters as PEFT stores them: read, checked, and merged into weights."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping

import numpy as np

from prumerge_jax.conversion import keys
from prumerge_jax.conversion.hf_config import Section
from prumerge_jax.conversion.keys import Dialect
from prumerge_jax.conversion.tensor_files import (
    Checkpoint,
    CheckpointError,
    StoredTensor,
    Tensor,
    TensorInfo,
    is_finite,
    load_object,
)
from prumerge_jax.models.config import TextConfig
from prumerge_jax.models.layers import AdapterConfig

# Fields of adapter_config.json that are read below or say nothing on the weights.
_READ_OR_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_alpha",
    "lora_dropout",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "revision",
    "target_modules",
    "task_type",
    "init_lora_weights",
}
# Initialisations that change nothing but the start of training. Others alter the base weights.
_PLAIN_INITIALISATIONS = (True, False, None, "gaussian", "orthogonal")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA directory.

    Attributes:
      config: rank, alpha and dropout.
      base: the model it was trained on, as it declares it.
      tensors: by canonical key.
    """

    config: AdapterConfig
    base: str
    tensors: Mapping[str, StoredTensor]


@dataclasses.dataclass(frozen=True)
class MergedTensor:
    """A weight with its adapter added, in PEFT's arithmetic: float32, to be rounded once."""

    base: Tensor
    lora_a: StoredTensor  # [rank, in]
    lora_b: StoredTensor  # [out, rank]
    scale: float

    @property
    def info(self) -> TensorInfo:
        """Of the weight without the adapter."""
        return self.base.info

    def read(self) -> np.ndarray:
        """float32(W) + scale * (B A), [out, in] float32."""
        return merged(self.base.read(), self.lora_a.read(), self.lora_b.read(), self.scale)


def merged(weight: np.ndarray, a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """`weight + scale * (b @ a)` in float32, bit for bit what PEFT computes before it rounds.

    Args:
      weight: [out, in].
      a: [rank, in].
      b: [out, rank].
      scale: alpha / rank.

    Raises:
      CheckpointError: the result overflows.
    """
    result = b.astype(np.float32) @ a.astype(np.float32)
    result *= np.float32(scale)
    result += weight.astype(np.float32)
    if not is_finite(result):
        raise CheckpointError("a merged weight overflows float32; the adapter is damaged")
    return result


def parse_adapter_config(folder: pathlib.Path) -> tuple[AdapterConfig, str]:
    """Rank, alpha, dropout, and the declared base model.

    Raises:
      CheckpointError: an option of PEFT that would change the weights and is not implemented.
    """
    path = folder / "adapter_config.json"
    section = Section(load_object(path), str(path))
    section.require("peft_type", ["LORA"])
    section.require("init_lora_weights", _PLAIN_INITIALISATIONS)
    for name, value in section.values.items():
        unset = value is None or value is False or value in ("none", {}, [])
        if name not in _READ_OR_HARMLESS and not unset:
            raise CheckpointError(
                f"{path}: {name} is {value!r:.80}; this option is not supported, only plain LoRA is"
            )
    rank = section.get("r", int, 8)
    alpha = float(section.get("lora_alpha", float, 8))
    dropout = float(section.get("lora_dropout", float, 0.0))
    if not (1 <= rank <= 1 << 14 and math.isfinite(alpha) and 0 <= dropout < 1):
        raise CheckpointError(f"{path}: r {rank}, lora_alpha {alpha}, lora_dropout {dropout}")
    base = section.get("base_model_name_or_path", str, None)
    return AdapterConfig(rank, alpha, dropout), base or ""


def match_adapter(
    checkpoint: Checkpoint, config: AdapterConfig, base: str, text: TextConfig, where: str
) -> Adapter:
    """Matches adapter tensors with the decoder's linear layers, by full key, never by suffix.

    Raises:
      CheckpointError: unknown, repeated or wrongly shaped tensors, or one of a pair missing.
    """
    expected = keys.expected_shapes(keys.adapter_weights(text, config.rank))
    present = {keys.canonical_key(key, Dialect.LLAVA) for key in checkpoint.tensors}
    # An adapter may leave linear layers out, but not one half of a pair.
    partners = {key.replace(".lora_A.", ".lora_B.") for key in present}
    partners |= {key.replace(".lora_B.", ".lora_A.") for key in present}
    wanted = {key: shape for key, shape in expected.items() if key in partners}
    if not wanted:
        raise CheckpointError(f"{where}: holds no adapter of a linear layer of the decoder")
    matched = keys.assign(checkpoint.tensors, Dialect.LLAVA, wanted, where)
    tensors = {key: StoredTensor(checkpoint, own) for key, own in matched.key_of.items()}
    return Adapter(config, base, tensors)


def merge_into(tensors: Mapping[str, Tensor], adapter: Adapter) -> dict[str, Tensor]:
    """The model's tensors with those that have an adapter replaced by their sum."""
    result = dict(tensors)
    for key, lora_a in adapter.tensors.items():
        if key.endswith(".lora_A.weight"):
            stem = key.removesuffix(".lora_A.weight")
            lora_b = adapter.tensors[f"{stem}.lora_B.weight"]
            base = tensors[f"{stem}.weight"]
            result[f"{stem}.weight"] = MergedTensor(base, lora_a, lora_b, adapter.config.scale)
    return result


def check_base(adapter: Adapter, folder: pathlib.Path, stated: str | None) -> None:
    """Guards against adding an adapter to another model of the same shapes.

    The base counts as the declared one if the declared name is in the path of `folder`, in the
    form of a hub cache too, or if the user states it.

    Raises:
      CheckpointError: neither.
    """
    if not adapter.base:
        return  # the adapter does not say
    name = adapter.base.rstrip("/").split("/")[-1]
    places = folder.resolve().parts
    if stated == adapter.base or any(
        part == name or part == f"models--{adapter.base.replace('/', '--')}" for part in places
    ):
        return
    raise CheckpointError(
        f"the adapter was trained on {adapter.base[:200]!r} and {folder} does not carry that name; "
        f"if it is that model, say so with --adapter_base={adapter.base[:200]}"
    )
