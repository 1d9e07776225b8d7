"""The configuration of a run as frozen dataclasses, parsed once from the fields that users set."""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import ml_collections

from prumerge_jax import reductions
from prumerge_jax.data.conversation import LabelProtocol
from prumerge_jax.data.datasets import DataConfig, known_options
from prumerge_jax.data.images import ImageMode
from prumerge_jax.data.packing import PositionIds
from prumerge_jax.data.sentencepiece_tokenizer import Style
from prumerge_jax.data.templates import trainable
from prumerge_jax.families import family_of
from prumerge_jax.messages import did_you_mean, quoted
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.layers import AdapterConfig
from prumerge_jax.training.optimizer import OptimizerConfig

Kind = TypeVar("Kind")

RANDOM = "random"
"""The value of `weights` that asks for random ones."""
LONGEST_ROW = 2048
"""Row length of LLaVA-1.5, in tokens; also where `max_length` is not given."""


class ConfigError(ValueError):
    """A field of a configuration is unknown or has a value that cannot be; the message names it."""


def _at_least(config: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}; expected at least {least}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; 0 takes the devices that remain, see `run.fitted_sizes`."""

    data: int = 0
    fsdp: int = 0
    tensor: int = 1

    def __post_init__(self) -> None:
        for axis, size in dataclasses.asdict(self).items():
            if size < 0:
                raise ValueError(f"{axis} is {size}; expected 0 or more devices")


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """How a run is executed, not what it computes; may change when it is resumed.

    Attributes:
      mesh: sizes of the mesh axes.
      rows_per_shard: rows of a micro-batch per data shard; 0 takes what suits the devices, see
        `fit.fitted`.
      frozen: whether the frozen weights are sharded over `fsdp`, and gathered layer by layer, or
        replicated on every data shard; `auto` takes what suits the devices, likewise.
      xla_options: whether a TPU gets the options of XLA that `models.tuning.TRAINING` has for it.
      num_threads: threads that read samples.
      num_workers: processes that do; 0 for none.
      log_every, save_every: steps between two records of the metrics, and two checkpoints.
      keep: number of checkpoints to keep.
      verify_weights: whether the SHA-256 of every file of the base model is checked.
    """

    mesh: MeshConfig = MeshConfig()
    rows_per_shard: int = 0
    frozen: Literal["auto", "sharded", "replicated"] = "auto"
    xla_options: bool = True
    num_threads: int = 2
    num_workers: int = 4
    log_every: int = 10
    save_every: int = 200
    keep: int = 2
    verify_weights: bool = True

    def __post_init__(self) -> None:
        _at_least(self, 1, "num_threads", "log_every", "save_every", "keep")
        _at_least(self, 0, "num_workers", "rows_per_shard")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What a run computes, and how.

    Attributes:
      objective: name of a registered objective.
      objective_options: fields that only this objective has.
      model: sizes; None takes those of the weights.
      weights: directory of the model to start from, `miniature`, or `random`.
      tokenizer: for random weights only, a `tokenizer.model` or the name of a registered one; a
        model directory contains one.
      learning_rates: pairs of a path pattern and a peak rate; what no pattern matches is frozen.
      adapter: LoRA on the decoder; None for none.
      data: the samples.
      conversation: name of the chat template.
      tokenizer_style, label_protocol, image_mode: see `Style`, `LabelProtocol`, `ImageMode`.
      crops_per_sample: room for tiles, images and frames of a sample, on average over a batch; None
        is as many as one image or video can have.
      group_by_modality_length: batches of images and batches of text alone, as in LLaVA.
      reduction: spelling of the token reduction, see `reductions.parse`.
      position_ids: see `packing.pack_window`.
      max_length: row length in tokens, visual ones included; None takes the model's positions, at
        most 2048.
      batch_size: samples per optimizer step, over all devices.
      epochs: passes over the samples, where `steps` is None.
      steps: number of optimizer steps.
      optimizer: settings that all parameter groups share.
      dtype: what the objective computes in.
      quantize: format of the frozen kernels of the decoder's layers, as in QLoRA (arXiv
        2305.14314); None keeps them in `dtype`.
      remat: see `remat.rematerialise`; `auto` takes the fastest that fits, see `fit.fitted`.
      seed: seed of the order of the samples, of dropout and of random weights.
      run: how the run is executed.
    """

    objective: str
    learning_rates: tuple[tuple[str, float], ...]
    data: DataConfig
    objective_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: LlavaConfig | None = None
    weights: str | None = None
    tokenizer: str | None = None
    adapter: AdapterConfig | None = None
    conversation: str = "v1"
    tokenizer_style: Style = "4.31"
    label_protocol: LabelProtocol = "prumerge"
    image_mode: ImageMode = "pad"
    crops_per_sample: int | None = None
    group_by_modality_length: bool = False
    reduction: str = "full"
    position_ids: PositionIds = "compact"
    max_length: int | None = None
    batch_size: int = 128
    epochs: float = 1.0
    steps: int | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    quantize: Literal["nf4", "int8", "int4"] | None = None
    remat: Literal["auto", "none", "full", "wide", "dots"] = "auto"
    seed: int = 42
    run: ExecutionConfig = ExecutionConfig()

    def __post_init__(self) -> None:
        _at_least(self, 1, "batch_size", "steps", "max_length", "crops_per_sample")
        _at_least(self, 0, "seed")
        reductions.parse(self.reduction)
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise ValueError(f"epochs is {self.epochs}; expected a positive number")
        for pattern, rate in self.learning_rates:
            if not (math.isfinite(rate) and rate >= 0):
                raise ValueError(
                    f"learning_rates: {quoted(pattern)} has the rate {rate}; expected 0 or more"
                )
        if self.conversation not in (known := trainable()):
            raise ValueError(
                f"conversation is {quoted(self.conversation)}; expected one of {known}"
                + did_you_mean(self.conversation, known)
            )

    @property
    def sizes(self) -> LlavaConfig:
        """The model's sizes, once they are known."""
        assert self.model is not None
        return self.model

    @property
    def shows_crops(self) -> bool:
        """Whether images may be several crops, or videos shown."""
        return bool(self.sizes.image_grid_pinpoints) or family_of(self.sizes).video is not None

    @property
    def room_for_crops(self) -> int:
        """`crops_per_sample`, once the model's sizes are known."""
        if self.crops_per_sample is not None or not self.shows_crops:
            return self.crops_per_sample or 1
        video = family_of(self.sizes).video
        return max(self.sizes.most_crops, video.num_frames if video else 1)

    @property
    def row_length(self) -> int:
        """Row length in tokens, once the model's sizes are known."""
        return self.max_length or min(LONGEST_ROW, self.sizes.text.max_positions)


def parse(config: ml_collections.ConfigDict) -> TrainConfig:
    """The configuration that the fields of `configs/` describe.

    Raises:
      ConfigError: a field is missing or unknown (the nearest name is given), or has another type
        or a value that cannot be.
    """
    values = json.loads(config.to_json())
    data = dict(_section(values.get("data"), "data"))
    own = {field.name for field in dataclasses.fields(DataConfig)} - {"options"}
    options = {name: value for name, value in data.items() if name not in own}
    _refuse_unknown(options, own | known_options(), "data.")
    values["data"] = {name: value for name, value in data.items() if name in own}
    values["data"]["options"] = options
    # An empty section, or a rank of 0, says that there is none.
    values["model"] = values.get("model") or None
    adapter = values.get("adapter")
    if isinstance(adapter, dict) and adapter.get("rank") == 0:
        values["adapter"] = None
    return _build(TrainConfig, values, "")


def objective_options(kind: type[Kind], config: TrainConfig) -> Kind:
    """The fields that an objective has of its own.

    Args:
      kind: a frozen dataclass, whose ValueErrors begin with the name of the field.
      config: configuration of the run.

    Raises:
      ConfigError: as `parse`.
    """
    return _build(kind, config.objective_options, "objective_options.")


def with_sizes(config: TrainConfig, model: LlavaConfig) -> TrainConfig:
    """The configuration with the sizes of the model that was found."""
    return dataclasses.replace(config, model=model)


def _build(kind: type[Kind], values: Any, prefix: str) -> Kind:
    values = _section(values, prefix.rstrip("."))
    hints = typing.get_type_hints(kind)
    _refuse_unknown(values, hints, prefix)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required and field.name not in values:
            raise ConfigError(f"config.{prefix}{field.name} is missing")
    converted = {
        name: _convert(hints[name], value, f"{prefix}{name}") for name, value in values.items()
    }
    try:
        return kind(**converted)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"config.{prefix}{error}") from None


def _convert(hint: Any, value: Any, name: str) -> Any:
    """A plain JSON value as the type of a field."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (argument for argument in arguments if argument is not types.NoneType)
        return _convert(hint, value, name)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, f"{name}.")
    if origin is tuple and isinstance(value, list):
        inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(inner) == len(value):
            return tuple(_convert(*pair, name) for pair in zip(inner, value, strict=True))
    elif origin is Literal:
        if value in arguments:
            return value
        raise ConfigError(
            f"config.{name} is {quoted(value)}; expected one of {list(arguments)}"
            + did_you_mean(str(value), [str(argument) for argument in arguments])
        )
    elif origin and issubclass(origin, Mapping):
        return dict(_section(value, name))
    elif hint is float and type(value) in (int, float):
        return float(value)
    elif type(value) is hint:  # a bool is not an int here
        return value
    expected = getattr(hint, "__name__", str(hint)) if origin is None else str(hint)
    raise ConfigError(f"config.{name} is {quoted(value)}; expected {expected}")


def _section(values: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ConfigError(f"config.{name} is {quoted(values)}; expected a section of fields")
    return values


def _refuse_unknown(values: Mapping[str, Any], known: Any, prefix: str) -> None:
    for name in values:
        if name not in known:
            raise ConfigError(
                f"unknown field config.{prefix}{name}" + did_you_mean(name, list(known))
            )
