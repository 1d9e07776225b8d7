"""The one table that maps checkpoint tensors to our weights, used in both directions.

Checkpoint keys of every dialect are first brought to one naming, called canonical here: what
llava-hf's files become after `canonical_key`, for example
`language_model.layers.0.mlp.up_proj.weight`.
"""

import dataclasses
import enum
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from prumerge_jax.conversion.tensor_files import ConversionError, TensorInfo, listing
from prumerge_jax.families import family_of
from prumerge_jax.models.config import (
    LlavaConfig,
    TextConfig,
    VisionConfig,
    decoder_linears,
)
from prumerge_jax.models.llava import projector_depth


class Dialect(enum.Enum):
    """A way of naming the same tensors."""

    HF = "llava-hf"  # a family's class in transformers, every generation of it
    LLAVA = "liuhaotian"  # the original code's; also a plain LLaMA or Vicuna
    CLIP = "clip"  # CLIPModel or CLIPVisionModel


class Transform(enum.Enum):
    """How a checkpoint's tensor becomes ours."""

    KEEP = None  # an empty tuple would not survive the enum of Python 3.11.0 to 3.11.2
    TRANSPOSE = (1, 0)  # a linear layer: [out, in] -> [in, out]
    CONVOLUTION = (2, 3, 1, 0)  # [out, in, h, w] -> [h, w, in, out]

    def checkpoint_view(self, ours: np.ndarray) -> np.ndarray:
        """A view of our tensor in the checkpoint's layout; imports write it, exports read it."""
        return ours.transpose(np.argsort(self.value)) if self.value else ours


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of ours and where a checkpoint keeps it.

    Attributes:
      path: our dotted path.
      pattern: the canonical key, `{}` in place of the layer number of a stacked weight.
      tensor_shape: shape of one checkpoint tensor.
      transform: how its layout becomes ours.
      num_layers: how many are stacked on a leading axis; None for a weight that is not stacked.
    """

    path: str
    pattern: str
    tensor_shape: tuple[int, ...]
    transform: Transform = Transform.KEEP
    num_layers: int | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The canonical keys, in layer order."""
        if self.num_layers is None:
            return (self.pattern,)
        return tuple(self.pattern.format(layer) for layer in range(self.num_layers))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of our weight."""
        axes = self.transform.value
        inner = tuple(self.tensor_shape[a] for a in axes) if axes else self.tensor_shape
        return inner if self.num_layers is None else (self.num_layers, *inner)


def weights(config: LlavaConfig) -> list[Weight]:
    """Every weight of the model, in the order in which they are converted."""
    towers = family_of(config).towers.items()
    return [
        *(weight for path, root in towers for weight in vision_weights(config.vision, path, root)),
        *projector_weights(config),
        *decoder_weights(config.text),
    ]


def unused_tower_tensors(config: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Canonical key and shape of tensors that checkpoints hold and LLaVA never uses.

    These are what follows the features in the tower, but for keys and queries, and its last norm.
    They are stored alongside the model, so that a complete checkpoint can be written again.
    """
    roots = family_of(config).towers.values()
    return {key: s for root in roots for key, s in unused_of_tower(config.vision, root).items()}


def unused_of_tower(vision: VisionConfig, root: str = "vision_tower") -> dict[str, tuple[int, ...]]:
    """`unused_tower_tensors` of one tower; `root` is its canonical name."""
    block = f"{root}.encoder.layers.{vision.num_layers - 1}"
    width, inner = vision.width, vision.mlp_width
    final = {f"{root}.post_layernorm.{leaf}": (width,) for leaf in ("weight", "bias")}
    if _whole_blocks(vision) == vision.num_layers:
        return dict(final)
    linears = {
        "self_attn.v_proj": (width, width),
        "self_attn.out_proj": (width, width),
        "mlp.fc1": (inner, width),
        "mlp.fc2": (width, inner),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in linears.items():
        shapes[f"{block}.{name}.weight"] = shape
        shapes[f"{block}.{name}.bias"] = shape[:1]
    name = f"{block}.layer_norm2"
    shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)
    return shapes | final


_MLP = ("gate_proj", "up_proj", "down_proj")

# Tensors that old files hold and every library recomputes.
_DERIVED = {
    r".*\.rotary_emb\.inv_freq": "rotary frequencies, recomputed from rope_theta",
    r".*embeddings\.position_ids": "position numbers 0, 1, 2, ..., recomputed",
}


def clip_ignored_reason(canonical: str) -> str | None:
    """As `ignored_reason`, for a CLIPModel, of which only the tower is used."""
    if re.match(r"text_model\.|(text|visual)_projection\.|logit_scale$", canonical):
        return "not of CLIP's vision tower"
    return ignored_reason(canonical)


def ignored_reason(canonical: str) -> str | None:
    """Why a tensor is left out although it is in a checkpoint, None if it is not."""
    for pattern, reason in _DERIVED.items():
        if re.fullmatch(pattern, canonical):
            return reason
    return None


def canonical_key(key: str, dialect: Dialect) -> str:
    """The canonical name of a checkpoint's tensor.

    llava-hf: wrappers of DDP, torch.compile and PEFT go; then one leading `model.`; then the four
    namings that transformers has used become one.
    """
    while wrapper := re.match(r"module\.|_orig_mod\.|base_model\.model\.", key):
        key = key[wrapper.end() :]
    if dialect is Dialect.CLIP:
        # CLIPVisionModel of transformers >= 5.8 has no `vision_model.`.
        own = r"^(?=(embeddings|pre_layrnorm|encoder|post_layernorm)\.)"
        return re.sub(rf"^vision_model\.|{own}", "vision_tower.", key)
    key = re.sub(r"^model\.", "", key)
    if dialect is Dialect.LLAVA:
        key = re.sub(r"^(vision|image|video)_tower\.\1_tower\.", r"\1_tower.", key)
        key = re.sub(r"^(embed_tokens|layers|norm)\.", r"language_model.\1.", key)
        key = re.sub(r"^mm_projector\.(weight|bias)$", r"mm_projector.0.\1", key)
        if index := re.match(r"mm_projector\.(\d{1,2})\.", key):
            key = f"multi_modal_projector.linear_{_hf_index(index[1])}.{key[index.end() :]}"
    key = re.sub(r"^language_model\.model\.", "language_model.", key)
    key = re.sub(r"^language_model\.lm_head\.", "lm_head.", key)
    return re.sub(r"^(vision|image|video)_tower\.vision_model\.", r"\1_tower.", key)


def dialect_key(canonical: str, dialect: Dialect, config: LlavaConfig) -> str:
    """The name of a tensor in files that a dialect's published code loads.

    llava-hf: the naming of the published files, which every version of transformers reads.
    """
    if dialect is Dialect.CLIP:
        return re.sub(r"^vision_tower\.", "vision_model.", canonical)
    if dialect is Dialect.HF:
        key = re.sub(r"^language_model\.", "language_model.model.", canonical)
        key = re.sub(r"^lm_head\.", "language_model.lm_head.", key)
        return re.sub(r"^(vision|image|video)_tower\.", r"\1_tower.vision_model.", key)
    key = re.sub(r"^language_model\.", "model.", canonical)
    key = re.sub(r"^vision_tower\.", "model.vision_tower.vision_tower.vision_model.", key)
    if index := re.match(r"multi_modal_projector\.linear_(\d+)\.", key):
        place = "" if config.projector == "linear" else f"{2 * (int(index[1]) - 1)}."
        key = f"model.mm_projector.{place}{key[index.end() :]}"
    return key


@dataclasses.dataclass(frozen=True)
class Assignment:
    """Where every tensor of a checkpoint goes.

    Attributes:
      key_of: the checkpoint's key, by canonical key.
      ignored: the checkpoint's keys that are left out, with the reason.
    """

    key_of: Mapping[str, str]
    ignored: Mapping[str, str]


def assign(
    tensors: Mapping[str, TensorInfo],
    dialect: Dialect,
    expected: Mapping[str, tuple[int, ...]],
    where: str,
    leave_out: Callable[[str], str | None] = ignored_reason,
) -> Assignment:
    """Matches a checkpoint's tensors with the expected ones, all or nothing.

    Args:
      tensors: the checkpoint's tensors, under its keys.
      dialect: how those keys are to be read.
      expected: shape by canonical key.
      where: names the checkpoint in errors.
      leave_out: the reason why a canonical key is not wanted, None if it is.

    Raises:
      ConversionError: lists every unknown, repeated, missing or wrongly shaped key.
    """
    key_of: dict[str, str] = {}
    ignored: dict[str, str] = {}
    unknown, repeated, shapes = [], [], []
    for key, info in tensors.items():
        canonical = canonical_key(key, dialect)
        if reason := leave_out(canonical):
            ignored[key] = reason
        elif canonical not in expected:
            unknown.append(key)
        elif canonical in key_of:
            repeated.append(f"{key} and {key_of[canonical]}")
        else:
            key_of[canonical] = key
            if info.shape != expected[canonical]:
                shapes.append(f"{key} {list(info.shape)} not {list(expected[canonical])}")
    missing = [canonical for canonical in expected if canonical not in key_of]
    faults = {
        "unknown tensors": unknown,
        "tensors stored twice": repeated,
        "missing tensors": missing,
        "tensors of another shape than the config says": shapes,
    }
    messages = [f"{fault}: {listing(found)}" for fault, found in faults.items() if found]
    if messages:
        raise ConversionError(f"{where}: {'; '.join(messages)}")
    return Assignment(key_of, ignored)


def expected_shapes(table: Iterable[Weight]) -> dict[str, tuple[int, ...]]:
    """Shape by canonical key of all tensors of these weights."""
    return {key: weight.tensor_shape for weight in table for key in weight.keys}


def _hf_index(original: str) -> int | str:
    """llava-hf numbers the projector's layers 1, 2, ...; the original by place: 0, 2, ..."""
    place = int(original)
    return place // 2 + 1 if place % 2 == 0 else f"?{original}"


def vision_weights(
    vision: VisionConfig, path: str = "vision", root: str = "vision_tower"
) -> Iterator[Weight]:
    """Weights of a tower that LLaVA uses; the rest are `unused_tower_tensors`.

    Args:
      vision: its sizes.
      path: our name of the tower.
      root: the canonical one.
    """
    width, patch, embeddings = vision.width, vision.patch_size, f"{root}.embeddings"
    if vision.cls_token:
        yield Weight(f"{path}.class_embedding", f"{embeddings}.class_embedding", (width,))
    yield Weight(
        f"{path}.patch_embedding.kernel",
        f"{embeddings}.patch_embedding.weight",
        (width, 3, patch, patch),
        Transform.CONVOLUTION,
    )
    if vision.patch_bias:
        bias = f"{embeddings}.patch_embedding.bias"
        yield Weight(f"{path}.patch_embedding.bias", bias, (width,))
    yield Weight(
        f"{path}.position_embedding",
        f"{embeddings}.position_embedding.weight",
        (vision.num_patches + vision.num_prefix, width),
    )
    if vision.pre_norm:
        yield from _norm(f"{path}.pre_layernorm", f"{root}.pre_layrnorm", width)
    stacked, layers = _whole_blocks(vision), f"{root}.encoder.layers"
    for name in ("layer_norm1", "layer_norm2"):
        yield from _norm(f"{path}.layers.{name}", f"{layers}.{{}}.{name}", width, stacked)
    linears = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
    linears |= {"mlp.fc1": (vision.mlp_width, width), "mlp.fc2": (width, vision.mlp_width)}
    for name, shape in linears.items():
        yield from _linear(f"{path}.layers.{name}", f"{layers}.{{}}.{name}", shape, stacked)
    if stacked == vision.num_layers:
        return
    yield from _norm(f"{path}.last.layer_norm1", f"{layers}.{stacked}.layer_norm1", width)
    for name in ("q_proj", "k_proj"):
        pattern = f"{layers}.{stacked}.self_attn.{name}"
        yield from _linear(f"{path}.last.{name}", pattern, (width, width))


def _whole_blocks(vision: VisionConfig) -> int:
    """Blocks of a tower that run as a whole: all up to the features."""
    return vision.num_layers + 1 + vision.feature_layer


def projector_weights(config: LlavaConfig) -> Iterator[Weight]:
    """Weights between the tower and the decoder."""
    width = config.text.width
    if config.image_newline:
        yield Weight("image_newline", "image_newline", (width,))
    for layer in range(projector_depth(config.projector)):
        shape = (width, config.vision.width if layer == 0 else width)
        pattern = f"multi_modal_projector.linear_{layer + 1}"
        yield from _linear(f"projector.linear_{2 * layer}", pattern, shape)


def decoder_weights(text: TextConfig) -> Iterator[Weight]:
    """Weights of the language model, embeddings and head included."""
    root, width, layers = "language_model", text.width, text.num_layers
    vocabulary = (text.vocab_size, width)
    yield Weight("decoder.embed_tokens", f"{root}.embed_tokens.weight", vocabulary)
    for name in ("input_layernorm", "post_attention_layernorm"):
        pattern = f"{root}.layers.{{}}.{name}.weight"
        yield Weight(f"decoder.layers.{name}.scale", pattern, (width,), num_layers=layers)
    for name, shape in checkpoint_linears(text).items():
        pattern = f"{root}.layers.{{}}.{name}.weight"
        path = f"decoder.layers.{name}.kernel"
        yield Weight(path, pattern, shape, Transform.TRANSPOSE, layers)
    for name in ("q_proj", "k_proj", "v_proj") if text.qkv_bias else ():
        pattern = f"{root}.layers.{{}}.self_attn.{name}.bias"
        path, outputs = f"decoder.layers.self_attn.{name}.bias", decoder_linears(text)[name][1:]
        yield Weight(path, pattern, outputs, num_layers=layers)
    yield Weight("decoder.norm.scale", f"{root}.norm.weight", (width,))
    if not text.tied_head:
        yield Weight("decoder.lm_head.kernel", "lm_head.weight", vocabulary, Transform.TRANSPOSE)


def adapter_weights(text: TextConfig, rank: int) -> Iterator[Weight]:
    """Weights of low-rank adapters on every linear layer of the decoder's blocks."""
    for name, (d_out, d_in) in checkpoint_linears(text).items():
        pattern, path = f"language_model.layers.{{}}.{name}", f"decoder.layers.{name}"
        for ours, theirs, shape in (
            ("lora_a", "lora_A", (rank, d_in)),
            ("lora_b", "lora_B", (d_out, rank)),
        ):
            yield Weight(
                f"{path}.{ours}",
                f"{pattern}.{theirs}.weight",
                shape,
                Transform.TRANSPOSE,
                text.num_layers,
            )


def checkpoint_linears(text: TextConfig) -> dict[str, tuple[int, int]]:
    """Name within a layer and [out, in] of the linear layers that carry adapters."""
    return {
        f"{'mlp' if name in _MLP else 'self_attn'}.{name}": (d_out, d_in)
        for name, (d_in, d_out) in decoder_linears(text).items()
    }


def _linear(
    path: str, pattern: str, shape: tuple[int, int], num_layers: int | None = None
) -> Iterator[Weight]:
    yield Weight(f"{path}.kernel", f"{pattern}.weight", shape, Transform.TRANSPOSE, num_layers)
    yield Weight(f"{path}.bias", f"{pattern}.bias", shape[:1], num_layers=num_layers)


def _norm(path: str, pattern: str, width: int, num_layers: int | None = None) -> Iterator[Weight]:
    yield Weight(f"{path}.scale", f"{pattern}.weight", (width,), num_layers=num_layers)
    yield Weight(f"{path}.bias", f"{pattern}.bias", (width,), num_layers=num_layers)
