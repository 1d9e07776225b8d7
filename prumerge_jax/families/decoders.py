"""Decoders by `model_type`: LLaMA, Mistral and Qwen2 are one class with different defaults."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from prumerge_jax.families.fields import ConversionError, Section, built
from prumerge_jax.models.config import RopeScaling, TextConfig


@dataclasses.dataclass(frozen=True)
class Decoder:
    """What transformers takes for absent fields of one `model_type`, and what it has.

    Attributes:
      vocab_size, mlp_width, num_kv_heads, max_positions: defaults; None for as many key heads as
        heads.
      qkv_bias: whether queries, keys and values have biases, which no field says.
      bos_id, eos_ids: defaults.
      scaled_rope: whether rotary scaling is known to work.
      stop_ids: what its chat template ends an answer with, in the published vocabulary.
    """

    vocab_size: int
    mlp_width: int
    num_kv_heads: int | None
    max_positions: int
    qkv_bias: bool = False
    bos_id: int | None = 1
    eos_ids: tuple[int, ...] = (2,)
    scaled_rope: bool = False


DECODERS: Mapping[str, Decoder] = {
    "llama": Decoder(32000, 11008, None, 2048, scaled_rope=True),
    "mistral": Decoder(32000, 14336, 8, 131072),
    "qwen2": Decoder(151936, 22016, 32, 32768, qkv_bias=True, bos_id=None, eos_ids=()),
}


def parse_text(section: Section, model_type: str = "llama", *, tied: bool = False) -> TextConfig:
    """The fields of a LlamaConfig, MistralConfig or Qwen2Config.

    Args:
      section: the object.
      model_type: which of `DECODERS`.
      tied: whether the embedding is the head too, as the whole model's configuration says.

    Raises:
      ConversionError: a field is malformed, out of bounds, or asks for something unsupported.
    """
    decoder = DECODERS[model_type]
    section.require("hidden_act", ["silu"])
    for name in ("attention_bias", "mlp_bias"):
        section.require(name, [False])
    section.require("quantization_config", [None])
    section.require("partial_rotary_factor", [1.0])
    heads = section.get("num_attention_heads", int, 32)
    width = section.get("hidden_size", int, 4096)
    kv_heads = section.get("num_key_value_heads", int, None)
    if kv_heads is None and "num_key_value_heads" not in section.values:
        kv_heads = decoder.num_kv_heads
    head_dim = section.get("head_dim", int, None)
    if heads < 1 or (head_dim is None and width % heads):
        raise ConversionError(
            f"{section.where}: hidden_size {width} is not a multiple of num_attention_heads {heads}"
        )
    max_positions = section.get("max_position_embeddings", int, decoder.max_positions)
    _check_attention(section, model_type, max_positions)
    theta, scaling = parse_rope(section, decoder.scaled_rope)
    return built(
        TextConfig,
        section.where,
        vocab_size=section.get("vocab_size", int, decoder.vocab_size),
        width=width,
        mlp_width=section.get("intermediate_size", int, decoder.mlp_width),
        num_layers=section.get("num_hidden_layers", int, 32),
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=width // heads if head_dim is None else head_dim,
        rope_theta=theta,
        rms_norm_eps=float(section.get("rms_norm_eps", float, 1e-6)),
        max_positions=max_positions,
        qkv_bias=decoder.qkv_bias,
        tied_head=tied,
        rope_scaling=scaling,
        model_type=model_type,
    )


def parse_rope(section: Section, scaled: bool) -> tuple[float, RopeScaling | None]:
    """Base and scaling: `rope_theta` and `rope_scaling` of transformers 4.x, or `rope_parameters`
    of 5.x.

    Raises:
      ConversionError: a kind of scaling that is not supported.
    """
    rope = section.section("rope_parameters")
    if section.values.get("rope_scaling") is not None:
        old = section.section("rope_scaling")
        if rope.values and rope.values != old.values:
            raise ConversionError(f"{section.where}: rope_parameters and rope_scaling disagree")
        rope = old
    theta = float(rope.get("rope_theta", float, section.get("rope_theta", float, 10000.0)))
    rope.require("partial_rotary_factor", [1.0])
    kind = rope.get(["rope_type", "type"], str, "default")
    supported = ("default", "linear", "llama3") if scaled else ("default",)
    if kind not in supported:
        raise ConversionError(
            f"{rope.where}: rope_type is {kind!r:.80}; only {' or '.join(supported)} is supported"
        )
    if kind == "default":
        return theta, None
    names = {"factor": "factor"}
    if kind == "llama3":
        names |= {name: name for name in ("low_freq_factor", "high_freq_factor")}
        names["original_max_positions"] = "original_max_position_embeddings"
    fields: dict[str, Any] = {}
    for ours, theirs in names.items():
        fields[ours] = rope.get(theirs, int if ours == "original_max_positions" else float, None)
        if fields[ours] is None:
            raise ConversionError(f"{rope.where}: {theirs} is missing, which {kind!r} needs")
    return theta, built(RopeScaling, rope.where, kind=kind, **fields)


def token_ids(section: Section, decoder: Decoder) -> dict[str, Any]:
    """`bos_token_id` and `eos_token_ids` of a configuration.

    Raises:
      ConversionError: they are no ids.
    """
    return {
        "bos_token_id": section.get("bos_token_id", int, decoder.bos_id),
        "eos_token_ids": stop_ids(section, decoder.eos_ids),
    }


def stop_ids(section: Section, default: Sequence[int]) -> tuple[int, ...]:
    """`eos_token_id`, which is one id, a list, or null for none.

    Raises:
      ConversionError: it is neither.
    """
    value = section.values.get("eos_token_id", list(default))
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ConversionError(
            f"{section.where}: eos_token_id is {value!r:.80}, expected an id or a list of ids"
        )
    return tuple(dict.fromkeys(ids))


def _check_attention(section: Section, model_type: str, max_positions: int) -> None:
    """Every layer must attend to everything before it."""
    kinds = section.get("layer_types", list, [])
    if other := [kind for kind in kinds if kind != "full_attention"]:
        raise ConversionError(
            f"{section.where}: layer_types holds {other[0]!r:.80}; only 'full_attention' is "
            "supported"
        )
    if model_type == "qwen2":
        section.require("use_sliding_window", [False])
        return
    if model_type == "llama":
        section.require("sliding_window", [None])
        return
    window = section.values.get("sliding_window", 4096)
    if window is not None and not (isinstance(window, int) and window >= max_positions):
        raise ConversionError(
            f"{section.where}: sliding_window is {window!r:.80} (absent means 4096); only null, or "
            f"at least max_position_embeddings {max_positions}, is supported"
        )
