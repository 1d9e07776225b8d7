"""Configurations as JSON: every field named, typed and bounded, nothing else accepted.

A `config.json` is untrusted input. No key of it is ever used as a name to import, call or fetch;
integers are bounded before any shape is built from them.
"""

import dataclasses
import os
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.layers import AdapterConfig
from prumerge_jax.store.model_directory import CONFIG, read_sections

# Inclusive bounds of every number in a configuration, by field name.
_BOUNDS: dict[str, tuple[float, float]] = {
    "image_size": (1, 8192),
    "patch_size": (1, 8192),
    "width": (1, 1 << 16),
    "mlp_width": (1, 1 << 18),
    "num_layers": (1, 1024),
    "num_heads": (1, 1024),
    "num_kv_heads": (1, 1024),
    "head_dim": (1, 1024),
    "vocab_size": (1, 1 << 21),
    "max_positions": (1, 1 << 24),
    "layer_norm_eps": (0, 1),
    "rms_norm_eps": (0, 1),
    "rope_theta": (1, 1e12),
    "factor": (1e-3, 1e6),
    "low_freq_factor": (1e-3, 1e6),
    "high_freq_factor": (1e-3, 1e6),
    "original_max_positions": (1, 1 << 24),
    "image_token_id": (0, 1 << 21),
    "pad_token_id": (0, 1 << 21),
    "bos_token_id": (0, 1 << 21),
    "eos_token_ids": (0, 1 << 21),
    "video_token_id": (0, 1 << 21),
    "feature_layer": (-2, -1),
    "image_grid_pinpoints": (1, 1 << 19),
    "anyres_max": (1, 64),
    "pixel_mean": (-1e3, 1e3),
    "pixel_std": (1e-6, 1e3),
    "rank": (1, 1 << 14),
    "alpha": (1e-6, 1e6),
    "dropout": (0, 1),
}
_MAX_STRING = 64
_MAX_ITEMS = 64
# Fields that directories written before other model families lack; they take their defaults.
_ADDED = frozenset(
    {
        *("qkv_bias", "tied_head", "rope_scaling", "model_type"),
        *("cls_token", "pre_norm", "patch_bias", "feature_layer", "attention", "pooling_head"),
        *("family", "video_token_id", "image_newline", "video_tower", "image_grid_pinpoints"),
        *("anyres_max", "anyres_source", "chat_template"),
    }
)

Config = TypeVar("Config")


def read_config(directory: str | os.PathLike[str]) -> LlavaConfig:
    """The sizes of the model in a directory.

    Raises:
      DirectoryError: no finished model directory, or its `config.json` was altered.
      ValueError: `config.json` is malformed or out of bounds.
    """
    values = read_sections(directory)["model"]
    if isinstance(values, dict) and "eos_token_id" in values:  # one id, in older directories
        values = values | {"eos_token_ids": [values["eos_token_id"]]}
        del values["eos_token_id"]
    return from_json(LlavaConfig, values, f"{directory}/{CONFIG}: model")


def read_adapter(directory: str | os.PathLike[str]) -> AdapterConfig | None:
    """The configuration of the adapters in a directory, None where it holds none.

    Raises:
      ValueError: as `read_config`.
    """
    adapter = read_sections(directory)["adapter"]
    if adapter is None:
        return None
    return from_json(AdapterConfig, adapter, f"{directory}/{CONFIG}: adapter")


def from_json(kind: type[Config], values: Any, where: str) -> Config:
    """Builds the dataclass `kind` from parsed JSON.

    Args:
      kind: a frozen dataclass of numbers, strings, tuples of numbers and further dataclasses.
      values: parsed JSON; every field must be there, but for those added since the first release,
        and nothing else.
      where: names the values in errors, for example `config.json: model`.

    Raises:
      ValueError: a field is missing, unknown, of another type or out of bounds.
    """
    fields = typing.get_type_hints(kind)
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected an object, got {type(values).__name__}")
    if unknown := sorted(set(values) - set(fields)):
        raise ValueError(f"{where}: unknown fields {unknown}; expected {sorted(fields)}")
    if missing := sorted(set(fields) - set(values) - _ADDED):
        raise ValueError(f"{where}: missing fields {missing}")
    try:
        return kind(
            **{
                name: _value(name, annotation, values[name], f"{where}.{name}")
                for name, annotation in fields.items()
                if name in values
            }
        )
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(where) else f"{where}: {message}") from None


def _value(name: str, annotation: Any, value: Any, where: str) -> Any:
    if isinstance(annotation, types.UnionType):  # `int | None`
        if value is None:
            return None
        (annotation,) = (t for t in typing.get_args(annotation) if t is not type(None))
    if dataclasses.is_dataclass(annotation):
        return from_json(typing.cast(type[Any], annotation), value, where)
    if typing.get_origin(annotation) is tuple:
        return _items(name, typing.get_args(annotation), value, where)
    if annotation is bool:
        if not isinstance(value, bool):
            raise ValueError(f"{where}: expected true or false, got {value!r:.80}")
        return value
    if annotation is str:
        if not isinstance(value, str) or len(value) > _MAX_STRING:
            raise ValueError(f"{where}: expected a string of at most {_MAX_STRING} characters")
        return value
    return _number(name, annotation, value, where)


def _items(name: str, kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """A tuple of fixed length, or of up to `_MAX_ITEMS` where `kinds` ends in an ellipsis."""
    free = kinds[-1] is Ellipsis
    length = f"at most {_MAX_ITEMS} entries" if free else f"{len(kinds)} numbers"
    if not isinstance(value, list) or not (
        len(value) <= _MAX_ITEMS if free else len(value) == len(kinds)
    ):
        raise ValueError(f"{where}: expected a list of {length}, got {value!r:.80}")
    items = kinds[:1] * len(value) if free else kinds
    return tuple(
        _value(name, kind, item, f"{where}[{i}]")
        for i, (kind, item) in enumerate(zip(items, value, strict=True))
    )


def _number(name: str, annotation: Any, value: Any, where: str) -> int | float:
    accepted = (int,) if annotation is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise ValueError(f"{where}: expected {annotation.__name__}, got {value!r:.80}")
    low, high = _BOUNDS[name]
    if not low <= value <= high:  # also refuses NaN
        raise ValueError(f"{where}: {value!r:.80} is outside {low} to {high}")
    return annotation(value)
