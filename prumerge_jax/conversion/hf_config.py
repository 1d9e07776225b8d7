"""`config.json` of PyTorch checkpoints, parsed by whitelist into a `LlavaConfig`.

Fields that only steer training, caching or the Python side of transformers are not read.
Every field that would change a result is read, or must have the one value that is supported.
"""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prumerge_jax.conversion.tensor_files import ConversionError, load_object
from prumerge_jax.models.config import CLIP_MEAN, CLIP_STD, LlavaConfig, TextConfig, VisionConfig
from prumerge_jax.models.config_json import from_json
from prumerge_jax.models.llava import projector_depth
from prumerge_jax.store.strict_json import to_json

_ABSENT = object()
_TOO_LARGE = 1 << 62
_VISION_ACTIVATIONS = ("quick_gelu", "gelu")


class Section:
    """One object of a configuration file, read field by field with defaults and types."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, Mapping):
            raise ConversionError(f"{where}: expected an object, got {type(values).__name__}")
        self.values = values
        self.where = where

    def get(self, names: str | Sequence[str], kind: type, default: Any) -> Any:
        """A field under one of several spellings.

        Raises:
          ConversionError: of another type, or two spellings disagree.
        """
        names = [names] if isinstance(names, str) else names
        found = {name: self.values[name] for name in names if name in self.values}
        if not found:
            return default
        name, value = next(iter(found.items()))
        if any(other != value for other in found.values()):
            raise ConversionError(f"{self.where}: {' and '.join(found)} disagree")
        if value is None and default is None:
            return None
        accepted = (int, float) if kind is float else (kind,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise ConversionError(
                f"{self.where}: {name} is {value!r:.80}, expected {kind.__name__}"
            )
        if isinstance(value, int) and abs(value) >= _TOO_LARGE:
            raise ConversionError(f"{self.where}: {name} is {value!r:.80}, out of all bounds")
        return value

    def require(self, name: str, supported: Sequence[Any], default: Any = _ABSENT) -> Any:
        """A field of which only some values are supported; absent means `default`.

        Raises:
          ConversionError: another value; the message says which are supported.
        """
        value = self.values.get(name, supported[0] if default is _ABSENT else default)
        if not any(value == s and type(value) is type(s) for s in supported):
            expected = " or ".join(repr(s) for s in supported)
            raise ConversionError(
                f"{self.where}: {name} is {value!r:.80}; only {expected} is supported"
            )
        return value

    def section(self, name: str) -> "Section":
        """A nested object; absent or null means empty."""
        nested = self.values.get(name)
        return Section({} if nested is None else nested, f"{self.where}: {name}")


def parse_hf(values: Any, where: str) -> LlavaConfig:
    """The config of a `LlavaForConditionalGeneration`, as transformers 4.x or 5.x writes it.

    Absent fields have the defaults of transformers' LlavaConfig, LlamaConfig and CLIPVisionConfig.

    Raises:
      ConversionError: a field is malformed, out of bounds, or asks for something unsupported.
    """
    top = Section(values, where)
    top.require("projector_hidden_act", ["gelu"])
    top.require("multimodal_projector_bias", [True])
    top.require("vision_feature_layer", [-2])
    top.require("vision_feature_select_strategy", ["default"])
    top.require("tie_word_embeddings", [False])
    top.require("quantization_config", [None])
    text_section = top.section("text_config")
    image_token_id = top.get(["image_token_index", "image_token_id"], int, 32000)
    pad = top.get("pad_token_id", int, None)
    config = LlavaConfig(
        vision=(
            VisionConfig()
            if top.values.get("vision_config") is None
            else parse_vision(top.section("vision_config"))
        ),
        text=parse_text(text_section),
        projector="mlp2x_gelu",
        image_token_id=image_token_id,
        pad_token_id=text_section.get("pad_token_id", int, None) if pad is None else pad,
        bos_token_id=text_section.get("bos_token_id", int, 1),
        eos_token_ids=stop_ids(text_section, (2,)),
    )
    for name in ("image_token_id", "pad_token_id"):
        token = getattr(config, name)
        if token is not None and not 0 <= token < config.text.vocab_size:
            raise ConversionError(
                f"{where}: {name} {token} is outside the vocabulary of {config.text.vocab_size}"
            )
    return _refusing(from_json, LlavaConfig, to_json(config), where)


def parse_llava(values: Any, where: str, vision: VisionConfig) -> LlavaConfig:
    """The config of a `LlavaLlamaForCausalLM`; the tower's sizes come from its config.

    Raises:
      ConversionError: a field is malformed, out of bounds, or asks for something unsupported.
    """
    top = Section(values, where)
    top.require("mm_vision_select_layer", [-2])
    top.require("mm_vision_select_feature", ["patch"])
    top.require("mm_use_im_start_end", [False])
    # The reference takes an absent field as true, and adds a token to the vocabulary.
    top.require("mm_use_im_patch_token", [False], default=True)
    top.require("mm_patch_merge_type", ["flat"])
    top.require("image_aspect_ratio", ["square", "pad", None])
    top.require("s2", [False])
    projector = top.get("mm_projector_type", str, "linear")
    try:
        projector_depth(projector)
    except ValueError as error:
        raise ConversionError(f"{where}: mm_projector_type: {error}") from None
    hidden = top.get("mm_hidden_size", int, vision.width)
    if hidden != vision.width:
        raise ConversionError(
            f"{where}: mm_hidden_size is {hidden}, the vision tower's width is {vision.width}"
        )
    config = LlavaConfig(
        vision=vision,
        text=parse_text(top),
        projector=projector,
        image_token_id=None,
        pad_token_id=None,
        bos_token_id=top.get("bos_token_id", int, 1),
        eos_token_ids=stop_ids(top, (2,)),
    )
    return _refusing(from_json, LlavaConfig, to_json(config), where)


def stop_ids(section: Section, default: tuple[int, ...]) -> tuple[int, ...]:
    """`eos_token_id`, which is one id or a list.

    Raises:
      ConversionError: it is neither.
    """
    value = section.values.get("eos_token_id", list(default))
    ids = value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ConversionError(
            f"{section.where}: eos_token_id is {value!r:.80}, expected an id or a list of ids"
        )
    return tuple(dict.fromkeys(ids))


def keeps_in_file_tower(values: Mapping[str, Any]) -> bool:
    """Whether the reference would use a vision tower stored in the checkpoint itself."""
    tunable = values.get("mm_tunable_parts")
    return values.get("unfreeze_mm_vision_tower") is True or (
        isinstance(tunable, str) and "mm_vision_tower" in tunable.split(",")
    )


def parse_clip(values: Any, where: str) -> VisionConfig:
    """The config of a CLIPModel or CLIPVisionModel.

    Raises:
      ConversionError: as `parse_hf`.
    """
    top = Section(values, where)
    return parse_vision(top.section("vision_config") if "vision_config" in top.values else top)


def parse_text(section: Section) -> TextConfig:
    """The fields of a LlamaConfig.

    Raises:
      ConversionError: as `parse_hf`.
    """
    section.require("model_type", ["llama", "llava", "llava_llama"])
    section.require("hidden_act", ["silu"])
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        section.require(name, [False])
    for name in ("rope_scaling", "sliding_window", "quantization_config"):
        section.require(name, [None])
    section.require("partial_rotary_factor", [1.0])
    heads = section.get("num_attention_heads", int, 32)
    width = section.get("hidden_size", int, 4096)
    kv_heads = section.get("num_key_value_heads", int, None)
    head_dim = section.get("head_dim", int, None)
    if heads < 1 or (head_dim is None and width % heads):
        raise ConversionError(
            f"{section.where}: hidden_size {width} is not a multiple of num_attention_heads {heads}"
        )
    return _built(
        section,
        TextConfig,
        vocab_size=section.get("vocab_size", int, 32000),
        width=width,
        mlp_width=section.get("intermediate_size", int, 11008),
        num_layers=section.get("num_hidden_layers", int, 32),
        num_heads=heads,
        num_kv_heads=heads if kv_heads is None else kv_heads,
        head_dim=width // heads if head_dim is None else head_dim,
        rope_theta=_rope_theta(section),
        rms_norm_eps=float(section.get("rms_norm_eps", float, 1e-6)),
        max_positions=section.get("max_position_embeddings", int, 2048),
    )


def parse_vision(section: Section) -> VisionConfig:
    """The fields of a CLIPVisionConfig.

    Raises:
      ConversionError: as `parse_hf`.
    """
    section.require("model_type", ["clip_vision_model", "clip"])
    section.require("num_channels", [3])
    return _built(
        section,
        VisionConfig,
        image_size=section.get("image_size", int, 224),
        patch_size=section.get("patch_size", int, 32),
        width=section.get("hidden_size", int, 768),
        mlp_width=section.get("intermediate_size", int, 3072),
        num_layers=section.get("num_hidden_layers", int, 12),
        num_heads=section.get("num_attention_heads", int, 12),
        layer_norm_eps=float(section.get("layer_norm_eps", float, 1e-5)),
        activation=section.require("hidden_act", _VISION_ACTIVATIONS),
    )


def with_processor(folder: pathlib.Path, vision: VisionConfig) -> VisionConfig:
    """Adds pixel mean and deviation from the processor files of a checkpoint, if it has them.

    Raises:
      ConversionError: they ask for other pixels, or for another number of image tokens, than this
        package would make.
    """
    pixels = None
    if (path := folder / "processor_config.json").is_file():
        processor = Section(load_object(path), str(path))
        # transformers' default is 0, with which 575 places meet 576 features.
        processor.require("num_additional_image_tokens", [1])
        processor.require("vision_feature_select_strategy", ["default", None])
        processor.require("patch_size", [vision.patch_size, None])
        if "image_processor" in processor.values:  # transformers 5.x
            pixels = processor.section("image_processor")
    if (path := folder / "preprocessor_config.json").is_file():
        pixels = Section(load_object(path), str(path))
    if pixels is None:
        return vision
    for name in ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"):
        pixels.require(name, [True, None])
    pixels.require("do_pad", [False, None])
    pixels.require("resample", [3, None])
    factor = pixels.get("rescale_factor", float, 1 / 255)
    if abs(factor * 255 - 1) > 1e-6:
        raise ConversionError(f"{pixels.where}: rescale_factor is {factor}, expected 1/255")
    side = vision.image_size
    square = {"height": side, "width": side}
    pixels.require("size", [{"shortest_edge": side}, side, square])
    pixels.require("crop_size", [square, side])
    mean, std = (
        pixels.get(name, list, list(default))
        for name, default in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))
    )
    values = to_json(vision) | {"pixel_mean": mean, "pixel_std": std}
    return _refusing(from_json, VisionConfig, values, pixels.where)


def _rope_theta(section: Section) -> float:
    """`rope_theta` of transformers 4.x, or `rope_parameters` of 5.x."""
    rope = section.section("rope_parameters")
    if rope.require("rope_type", ["default"]) != "default" or len(rope.values) > 2:
        raise ConversionError(f"{rope.where}: scaled rotary embeddings are not supported")
    return float(rope.get("rope_theta", float, section.get("rope_theta", float, 10000.0)))


def _built(section: Section, kind: type, **fields: Any) -> Any:
    return _refusing(from_json, kind, to_json(kind()) | fields, section.where)


def _refusing(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function of our model's configuration, whose errors are the checkpoint's here."""
    try:
        return function(*arguments)
    except ValueError as error:
        raise ConversionError(str(error)[:300]) from None
