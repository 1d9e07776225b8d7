"""What a family of models declares, and what the configurations of all have in common."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from prumerge_jax.families.decoders import DECODERS, parse_text, token_ids
from prumerge_jax.families.fields import ConversionError, Section, built
from prumerge_jax.models.config import LlavaConfig, VisionConfig


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """The processor files of a family, as transformers writes and reads them.

    Attributes:
      kind: `image_processor_type`.
      processor: `processor_class`.
      crops: whether the short side is resized and the rest cut off; else the image is squeezed
        into a square.
      do_pad: values that `do_pad` may have; the first is written, None is absent.
      needs: fields without which transformers would make other pixels.
      expected: values of further fields of `processor_config.json`, by name.
    """

    kind: str
    processor: str
    crops: bool
    do_pad: tuple[bool | None, ...]
    needs: tuple[str, ...]
    expected: Callable[[VisionConfig], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class VideoRule:
    """How a family sees videos.

    Attributes:
      num_frames: frames that are taken of a longer video.
      squeezed: whether frames are squeezed into a square; else all but the central square is cut
        off.
      pooling: a frame has this many times fewer tokens along a side than an image, rounded up.
      cls: whether the tower's CLS feature stands in front of the patches of a frame.
    """

    num_frames: int
    squeezed: bool = False
    pooling: int = 1
    cls: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """A relative of LLaVA-1.5.

    Attributes:
      name: `LlavaConfig.family`.
      title: its name in messages.
      architecture: its class in transformers.
      model_type: its `model_type` there.
      parse: the configuration of a checkpoint of transformers, from the fields of `config.json`.
      fields: what `config.json` holds of a configuration beyond what all families share.
      processor: its processor files.
      image_mode: how images become pixels unless told otherwise, see `data.pictures.PictureMode`.
      towers: root of each tower's tensors in a checkpoint, by our name of the tower.
      video: how videos are seen; None where they cannot be asked about.
      sizes: the published configurations by name.
    """

    name: str
    title: str
    architecture: str
    model_type: str
    parse: Callable[[Section], LlavaConfig]
    fields: Callable[[LlavaConfig], Mapping[str, Any]]
    processor: ImageProcessor
    image_mode: Literal["pad", "crop", "anyres"]
    sizes: Mapping[str, LlavaConfig]
    towers: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"vision": "vision_tower"}
    )
    video: VideoRule | None = None


def parse_model(
    top: Section,
    *,
    vision: VisionConfig,
    decoders: tuple[str, ...],
    feature_layer: int,
    strategy: str,
    image_token_id: int,
    may_tie: bool = False,
    **own: Any,
) -> LlavaConfig:
    """A configuration from the fields that all families share, and a family's own.

    Args:
      top: `config.json`.
      vision: the tower, parsed.
      decoders: `model_type` of the decoders that the family comes with; absent is the first.
      feature_layer: the supported `vision_feature_layer`.
      strategy: the supported `vision_feature_select_strategy`.
      image_token_id: the default.
      may_tie: whether the head may be the embedding.
      own: further fields of `LlavaConfig`.

    Raises:
      ConversionError: a field is malformed, out of bounds, or asks for something unsupported.
    """
    top.require("projector_hidden_act", ["gelu"])
    top.require("multimodal_projector_bias", [True])
    top.require("vision_feature_layer", [feature_layer])
    top.require("vision_feature_select_strategy", [strategy, None])
    top.require("quantization_config", [None])
    text = top.section("text_config")
    model_type = text.require("model_type", decoders)
    ties = [part.get("tie_word_embeddings", bool, False) for part in (top, text)]
    for part, ties_here in zip((top, text), ties, strict=True):
        if ties_here and not may_tie:
            part.require("tie_word_embeddings", [False])
    pad = top.get("pad_token_id", int, None)
    config = built(
        LlavaConfig,
        top.where,
        vision=vision,
        text=parse_text(text, model_type, tied=any(ties)),
        projector="mlp2x_gelu",
        image_token_id=top.get(["image_token_index", "image_token_id"], int, image_token_id),
        pad_token_id=text.get("pad_token_id", int, None) if pad is None else pad,
        **token_ids(text, DECODERS[model_type]),
        **own,
    )
    check_tokens(config, top.where)
    return config


def check_tokens(config: LlavaConfig, where: str) -> None:
    """Checks that special ids are in the vocabulary.

    Raises:
      ConversionError: one is not.
    """
    rows = config.text.vocab_size
    named = {
        name: getattr(config, name)
        for name in ("image_token_id", "video_token_id", "pad_token_id", "bos_token_id")
    }
    named |= {f"eos_token_id[{n}]": token for n, token in enumerate(config.eos_token_ids)}
    for name, token in named.items():
        if token is not None and not 0 <= token < rows:
            raise ConversionError(f"{where}: {name} {token} is outside the vocabulary of {rows}")


def grid_pinpoints(
    section: Section, default: list[list[int]], side: int
) -> tuple[tuple[int, int], ...]:
    """`image_grid_pinpoints`, (height, width) pairs.

    Raises:
      ConversionError: no pairs, none or more than 64, or not multiples of `side`.
    """
    pairs = section.get("image_grid_pinpoints", list, default)
    if not 1 <= len(pairs) <= 64 or not all(
        isinstance(pair, list)
        and len(pair) == 2
        and all(type(n) is int and n > 0 and n % side == 0 for n in pair)
        for pair in pairs
    ):
        raise ConversionError(
            f"{section.where}: image_grid_pinpoints is {str(pairs)[:80]}; expected 1 to 64 pairs "
            f"of multiples of the tower's {side}"
        )
    return tuple((height, width) for height, width in pairs)
