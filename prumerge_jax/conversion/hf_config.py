"""`config.json` and processor files of PyTorch checkpoints, read into a `LlavaConfig`."""

import ast
import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from prumerge_jax.conversion.tensor_files import ConversionError, load_object
from prumerge_jax.families import family_of
from prumerge_jax.families.base import check_tokens, grid_pinpoints
from prumerge_jax.families.decoders import DECODERS, parse_text, stop_ids, token_ids
from prumerge_jax.families.fields import Section, built
from prumerge_jax.families.llava_next import chat_template
from prumerge_jax.families.llava_onevision import anyres_max
from prumerge_jax.families.towers import parse_clip
from prumerge_jax.models.config import CLIP_MEAN, CLIP_STD, MAX_STOP_IDS, LlavaConfig, VisionConfig
from prumerge_jax.models.llava import projector_depth

# Ids that end an answer in the chat templates of published vocabularies.
_TEMPLATE_STOPS = {"qwen_1_5": 151645, "llava_llama_3": 128009}
# Decoders of the original code by the architecture of its files.
ORIGINALS = {
    "LlavaLlamaForCausalLM": "llama",
    "LlavaMistralForCausalLM": "mistral",
    "LlavaQwenForCausalLM": "qwen2",
}
VIDEO_LLAVA_TOWERS = ("mm_image_tower", "mm_video_tower")
"""Fields of an original Video-LLaVA that name its towers."""
# Sides that the original code takes grids like "(1x1),...,(6x6)" times.
_GRID_SIDES = (224, 336, 384, 448, 512)


def parse_llava(values: Any, where: str, vision: VisionConfig) -> LlavaConfig:
    """The config of an original LLaVA, LLaVA-NeXT, LLaVA-OneVision or Video-LLaVA.

    Args:
      values: `config.json`, parsed.
      where: names it.
      vision: the tower's sizes, which come from its own config.

    Raises:
      ConversionError: a field is malformed, out of bounds, or asks for something unsupported.
    """
    top = Section(values, where)
    if vision.cls_token:  # the code for SigLIP takes the last layer, whatever this says
        top.require("mm_vision_select_layer", [-2])
    top.require("mm_vision_select_feature", ["patch"])
    top.require("mm_use_im_start_end", [False])
    # The reference takes an absent field as true, and adds a token to the vocabulary.
    top.require("mm_use_im_patch_token", [False], default=True)
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
    names = top.get("architectures", list, [])
    model_type = next((ORIGINALS[name] for name in names if name in ORIGINALS), "llama")
    text = parse_text(top, model_type, tied=top.get("tie_word_embeddings", bool, False))
    config = built(
        LlavaConfig,
        where,
        vision=vision,
        text=text,
        projector=projector,
        image_token_id=None,
        pad_token_id=None,
        **token_ids(top, DECODERS[model_type]),
        **_original_family(top, vision, text.model_type),
    )
    if config.family == "llava_next":
        config = dataclasses.replace(config, chat_template=chat_template(text))
    check_tokens(config, where)
    return config


def _original_family(top: Section, vision: VisionConfig, model_type: str) -> dict[str, Any]:
    """What tells further families from LLaVA-1.5 in the original's fields."""
    aspect = top.get("image_aspect_ratio", str, None)
    if aspect is None or not aspect.startswith("anyres"):
        top.require("mm_patch_merge_type", ["flat"])
        top.require("image_aspect_ratio", ["square", "pad", None])
        if model_type != "llama":
            raise ConversionError(
                f"{top.where}: image_aspect_ratio is {aspect!r:.80} with a {model_type} decoder; "
                "only 'anyres' and 'anyres_max_N' are supported there"
            )
        if not top.values.get(VIDEO_LLAVA_TOWERS[0]):
            return {}
        return {"family": "video_llava", "video_tower": True, "chat_template": "llava_v1"}
    top.require("mm_patch_merge_type", ["spatial_unpad"], default="flat")
    top.require("mm_newline_position", ["one_token"])
    top.require("mm_spatial_pool_mode", ["bilinear", None])
    top.require("add_faster_video", [False])
    own: dict[str, Any] = {
        "family": "llava_next",
        "image_newline": True,
        "image_grid_pinpoints": _original_pinpoints(top, vision.image_size),
        "anyres_source": "original",
    }
    if aspect == "anyres":
        if not vision.cls_token:
            raise ConversionError(
                f"{top.where}: image_aspect_ratio 'anyres' with a SigLIP tower; only "
                "'anyres_max_N' is supported there"
            )
        return own
    if model_type != "qwen2":
        raise ConversionError(
            f"{top.where}: image_aspect_ratio is {aspect!r:.80} with a {model_type} decoder; only "
            "'anyres' is supported there"
        )
    own["anyres_max"] = anyres_max(top, "image_aspect_ratio", aspect)
    return own | {"family": "llava_onevision", "chat_template": "qwen_1_5"}


def _original_pinpoints(top: Section, side: int) -> tuple[tuple[int, int], ...]:
    """`image_grid_pinpoints` of the original code, which has (width, height), as a list or a
    string: a literal list, or `(1x1),...,(6x6)` times the tower's side."""
    value = top.values.get("image_grid_pinpoints")
    if isinstance(value, str) and "x" in value:
        counts = [tuple(map(int, pair)) for pair in re.findall(r"\((\d{1,2})x(\d{1,2})\)", value)]
        if not counts or side not in _GRID_SIDES:
            raise ConversionError(
                f"{top.where}: image_grid_pinpoints is {value!r:.80} for a tower of {side}; "
                f"expected '(1x1),...,(6x6)' and a side among {_GRID_SIDES}"
            )
        (first_w, first_h), (last_w, last_h) = counts[0], counts[-1]
        value = [
            [width * side, height * side]
            for width in range(first_w, last_w + 1)
            for height in range(first_h, last_h + 1)
        ]
    elif isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ConversionError(
                f"{top.where}: image_grid_pinpoints is {value!r:.80}; expected a list of pairs"
            ) from None
    section = Section({"image_grid_pinpoints": value}, top.where)
    return tuple((height, width) for width, height in grid_pinpoints(section, [], side))


def keeps_in_file_tower(values: Mapping[str, Any]) -> bool:
    """Whether the vision tower is the one that is stored in the checkpoint itself.

    LLaVA's is if it was trained. Those of Video-LLaVA never are, but are stored all the same:
    transformers' converter of its weights reads them there.
    """
    tunable = values.get("mm_tunable_parts")
    if values.get(VIDEO_LLAVA_TOWERS[0]):
        return True
    return values.get("unfreeze_mm_vision_tower") is True or (
        isinstance(tunable, str) and "mm_vision_tower" in tunable.split(",")
    )


def parse_tower(values: Any, where: str) -> VisionConfig:
    """The config of a CLIPModel or CLIPVisionModel.

    Raises:
      ConversionError: as `parse_llava`.
    """
    top = Section(values, where)
    return parse_clip(top.section("vision_config") if "vision_config" in top.values else top)


def with_stops(folder: pathlib.Path, config: LlavaConfig) -> LlavaConfig:
    """Adds the stop ids of `generation_config.json` and of the chat template.

    Raises:
      ConversionError: an id is outside the vocabulary, or there is none.
    """
    ids, where = config.eos_token_ids, str(folder / "config.json")
    if (path := folder / "generation_config.json").is_file():
        where = str(path)
        ids = stop_ids(Section(load_object(path), where), ids)
    template_stop = _TEMPLATE_STOPS.get(config.chat_template or "")
    if template_stop is not None and template_stop < config.text.vocab_size:
        ids = tuple(dict.fromkeys((*ids, template_stop)))
    if not 1 <= len(ids) <= MAX_STOP_IDS:
        raise ConversionError(
            f"{where}: eos_token_id gives {len(ids)} stop ids; expected 1 to {MAX_STOP_IDS}"
        )
    config = dataclasses.replace(config, eos_token_ids=ids)
    check_tokens(config, where)
    return config


def with_processor(folder: pathlib.Path, config: LlavaConfig) -> LlavaConfig:
    """Adds pixel mean and deviation from the processor files of a checkpoint, if it has them.

    Raises:
      ConversionError: they ask for other pixels, or for another number of image tokens, than this
        package would make.
    """
    spec, vision, pixels = family_of(config).processor, config.vision, None
    if (path := folder / "processor_config.json").is_file():
        processor = Section(load_object(path), str(path))
        for name, expected in spec.expected(vision).items():
            missing_is_wrong = name.startswith("num_")
            processor.require(name, [expected] if missing_is_wrong else [expected, None])
        _check_aspect(processor, config)
        if "image_processor" in processor.values:  # transformers 5.x
            pixels = processor.section("image_processor")
    if (path := folder / "preprocessor_config.json").is_file():
        pixels = Section(load_object(path), str(path))
    if pixels is None:
        return config
    if missing := [name for name in spec.needs if pixels.values.get(name) is None]:
        raise ConversionError(
            f"{pixels.where}: {missing[0]} is missing; the image processor's own default makes "
            f"other pixels than {family_of(config).title}'s"
        )
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        pixels.require(name, [True, None])
    pixels.require("do_center_crop", [spec.crops, None])
    pixels.require("do_pad", spec.do_pad)
    pixels.require("resample", [3, None])
    factor = pixels.get("rescale_factor", float, 1 / 255)
    if abs(factor * 255 - 1) > 1e-6:
        raise ConversionError(f"{pixels.where}: rescale_factor is {factor}, expected 1/255")
    side = vision.image_size
    square = {"height": side, "width": side}
    if spec.crops:
        pixels.require("size", [{"shortest_edge": side}, side, square])
        pixels.require("crop_size", [square, side])
    else:
        pixels.require("size", [square, side])
    _check_grid(pixels, config)
    mean, std = (
        tuple(pixels.get(name, list, list(default)))
        for name, default in (("image_mean", CLIP_MEAN), ("image_std", CLIP_STD))
    )
    pixel_vision = built(
        VisionConfig,
        pixels.where,
        **{
            field.name: getattr(vision, field.name)
            for field in dataclasses.fields(vision)
            if not field.name.startswith("pixel_")
        },
        pixel_mean=mean,
        pixel_std=std,
    )
    return dataclasses.replace(config, vision=pixel_vision)


def _check_grid(pixels: Section, config: LlavaConfig) -> None:
    """The processor cuts tiles by its own list, the model packs features by the config's."""
    own = [list(pair) for pair in config.image_grid_pinpoints]
    if own and config.anyres_source == "hf":
        pixels.require("image_grid_pinpoints", [own])
    _check_aspect(pixels, config)


def _check_aspect(section: Section, config: LlavaConfig) -> None:
    if config.anyres_max is not None:
        section.require("vision_aspect_ratio", [f"anyres_max_{config.anyres_max}", None])
