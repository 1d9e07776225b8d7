"""Low-rank adapters as PEFT stores them: read, checked, and merged into weights."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping

import numpy as np

from prumerge_jax.conversion import keys
from prumerge_jax.conversion.keys import Dialect
from prumerge_jax.conversion.tensor_files import (
    Checkpoint,
    ConversionError,
    StoredTensor,
    Tensor,
    TensorInfo,
    is_finite,
    load_object,
)
from prumerge_jax.families.fields import Section
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
        """Shape and dtype of the weight without the adapter."""
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
      ConversionError: the result overflows.
    """
    result = b.astype(np.float32) @ a.astype(np.float32)
    result *= np.float32(scale)
    result += weight.astype(np.float32)
    if not is_finite(result):
        raise ConversionError("a merged weight overflows float32; the adapter is damaged")
    return result


def parse_adapter_config(folder: pathlib.Path) -> tuple[AdapterConfig, str]:
    """Rank, alpha, dropout, and the declared base model.

    Raises:
      ConversionError: an option of PEFT that would change the weights and is not implemented.
    """
    path = folder / "adapter_config.json"
    section = Section(load_object(path), str(path))
    section.require("peft_type", ["LORA"])
    section.require("init_lora_weights", _PLAIN_INITIALISATIONS)
    for name, value in section.values.items():
        unset = value is None or value is False or value in ("none", {}, [])
        if name not in _READ_OR_HARMLESS and not unset:
            raise ConversionError(
                f"{path}: {name} is {value!r:.80}; this option is not supported, only plain LoRA is"
            )
    rank = section.get("r", int, 8)
    alpha = float(section.get("lora_alpha", float, 8))
    dropout = float(section.get("lora_dropout", float, 0.0))
    if not (1 <= rank <= 1 << 14 and math.isfinite(alpha) and 0 <= dropout < 1):
        raise ConversionError(f"{path}: r {rank}, lora_alpha {alpha}, lora_dropout {dropout}")
    base = section.get("base_model_name_or_path", str, None)
    return AdapterConfig(rank, alpha, dropout), base or ""


def match_adapter(
    checkpoint: Checkpoint, config: AdapterConfig, base: str, text: TextConfig, where: str
) -> Adapter:
    """Matches adapter tensors with the decoder's linear layers, by full key, never by suffix.

    Raises:
      ConversionError: unknown, repeated or wrongly shaped tensors, or one of a pair missing.
    """
    _refuse_other_modules(checkpoint, where)
    expected = keys.expected_shapes(keys.adapter_weights(text, config.rank))
    present = {keys.canonical_key(key, Dialect.LLAVA) for key in checkpoint.tensors}
    # An adapter may leave linear layers out, but not one half of a pair.
    partners = {key.replace(".lora_A.", ".lora_B.") for key in present}
    partners |= {key.replace(".lora_B.", ".lora_A.") for key in present}
    wanted = {key: shape for key, shape in expected.items() if key in partners}
    if not wanted:
        raise ConversionError(f"{where}: holds no adapter of a linear layer of the decoder")
    matched = keys.assign(checkpoint.tensors, Dialect.LLAVA, wanted, where)
    tensors = {key: StoredTensor(checkpoint, own) for key, own in matched.key_of.items()}
    return Adapter(config, base, tensors)


def _refuse_other_modules(checkpoint: Checkpoint, where: str) -> None:
    """Says what to do with adapters on the tower, the projector, the embedding or the head.

    PEFT matches `target_modules` by suffix, and the tower has a `q_proj` and a `v_proj` too.
    """
    for key in checkpoint.tensors:
        canonical = keys.canonical_key(key, Dialect.LLAVA)
        if ".lora_" in canonical and not canonical.startswith("language_model.layers."):
            module = canonical.split(".lora_")[0]
            raise ConversionError(
                f"{where}: has adapters on other modules than the decoder's layers, {module[:80]} "
                "for one, which is not supported: train with target_modules limited to "
                "language_model.layers, or merge them with PEFT's merge_and_unload() and convert "
                "the merged model"
            )


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
      ConversionError: neither.
    """
    if not adapter.base:
        return  # the adapter does not say
    name = adapter.base.rstrip("/").split("/")[-1]
    places = folder.resolve().parts
    if stated == adapter.base or any(
        part == name or part == f"models--{adapter.base.replace('/', '--')}" for part in places
    ):
        return
    raise ConversionError(
        f"the adapter was trained on {adapter.base[:80]!r} and {folder} does not carry that name; "
        f"if it is that model, say so with --adapter_base={adapter.base[:80]}"
    )
