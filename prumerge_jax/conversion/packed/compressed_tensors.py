"""Linear layers as compressed-tensors stores them: int8 by rows, and packed int4 and int8.

`int-quantized`: `weight` int8 [d_out, d_in]. `pack-quantized`: `weight_packed` int32 [d_out, d_in /
n] holds n numbers along d_in, lowest bits first, each plus half of its range. Both: symmetric, `W =
q * weight_scale`, a scale per row or per row and group. Rules: compressors/quantized_compressors of
github.com/vllm-project/compressed-tensors.
"""

import dataclasses
from typing import Any

import numpy as np

from prumerge_jax.conversion.packed.base import (
    Codes,
    PackedLinear,
    Read,
    Tensors,
    finite,
    info_of,
    require_shape,
    split_words,
)
from prumerge_jax.conversion.tensor_files import ConversionError
from prumerge_jax.families.fields import Section
from prumerge_jax.models.quantisation import Format


@dataclasses.dataclass(frozen=True)
class _Symmetric:
    """Attributes: `stem` of the names; `bits` of packed numbers, 0 where they are not packed;
    `groups`, scales of a row."""

    stem: str
    shape: tuple[int, int]
    bits: int
    groups: int

    @property
    def parts(self) -> tuple[str, ...]:
        names = ("weight_packed", "weight_shape") if self.bits else ("weight",)
        return tuple(self.stem + name for name in (*names, "weight_scale"))

    def values(self, read: Read) -> np.ndarray:
        scale = np.repeat(self._scale(read), self.shape[1] // self.groups, 1)
        return self._codes(read).astype(np.float32) * scale

    def codes_in(self, form: Format, read: Read) -> Codes | None:
        if form.stored_as != "int8" or self.groups > 1 or self.bits == 4:
            return None
        return Codes(np.ascontiguousarray(self._codes(read).T), self._scale(read).T)

    def _codes(self, read: Read) -> np.ndarray:
        """int8 [d_out, d_in]."""
        if not self.bits:
            return read(f"{self.stem}weight")
        self._check_shape(read)
        numbers = split_words(read(f"{self.stem}weight_packed"), self.bits)
        half = 1 << (self.bits - 1)
        numbers = numbers.reshape(len(numbers), -1)[:, : self.shape[1]]
        return (numbers.astype(np.int16) - half).astype(np.int8)

    def _check_shape(self, read: Read) -> None:
        declared = tuple(int(side) for side in read(f"{self.stem}weight_shape").reshape(-1)[:2])
        if declared != self.shape:
            raise ConversionError(
                f"{self.stem[:160]}weight_shape is {declared}, expected {self.shape}"
            )

    def _scale(self, read: Read) -> np.ndarray:
        name = f"{self.stem}weight_scale"
        return finite(read(name), name)


def find(config: Section, tensors: Tensors, read: Read) -> dict[str, PackedLinear]:
    """The linear layers that compressed-tensors holds, by the name of their weight.

    Raises:
      ConversionError: other formats or bits, zero points, act-order, or parts that do not fit.
    """
    kind = config.require("format", ["int-quantized", "pack-quantized"], default=None)
    bits = {_bits(config, group) for group in _groups(config)}
    if len(bits) != 1 or (kind == "int-quantized" and bits != {8}):
        raise ConversionError(
            f"{config.where}: weights of {sorted(bits)} bits in {kind}; expected 8, or 4 packed"
        )
    packed = bits.pop() if kind == "pack-quantized" else 0
    found: dict[str, PackedLinear] = {}
    for name in tensors:
        if not name.endswith(".weight_scale"):
            continue
        stem = name.removesuffix("weight_scale")
        for extra in ("weight_zero_point", "weight_g_idx"):
            if stem + extra in tensors:
                raise ConversionError(f"{(stem + extra)[:160]}: not supported, only symmetric is")
        found[f"{stem}weight"] = _linear(stem, packed, tensors)
    return found


def _linear(stem: str, bits: int, tensors: Tensors) -> _Symmetric:
    scale = f"{stem}weight_scale"
    rows, groups = info_of(tensors, scale, ("float16", "bfloat16", "float32"), 2).shape
    if bits:
        words = info_of(tensors, f"{stem}weight_packed", ("int32",), 2).shape
        info_of(tensors, f"{stem}weight_shape", ("int64", "int32"), 1)
        require_shape(tensors, f"{stem}weight_shape", (2,))
        d_out, d_in = words[0], words[1] * 32 // bits
    else:
        d_out, d_in = info_of(tensors, f"{stem}weight", ("int8",), 2).shape
    if rows != d_out or not groups or d_in % groups:
        raise ConversionError(
            f"{scale[:160]}: shape {[rows, groups]} does not fit a weight of {[d_out, d_in]}"
        )
    return _Symmetric(stem, (d_out, d_in), bits, groups)


def _groups(config: Section) -> list[Any]:
    groups = config.section("config_groups").values
    if not groups:
        raise ConversionError(f"{config.where}: no config_groups")
    return list(groups.values())[:64]


def _bits(config: Section, group: Any) -> int:
    """Bits of the weights of one group of layers, whose other fields are checked."""
    weights = Section(group, f"{config.where}: config_groups").section("weights")
    weights.require("symmetric", [True])
    weights.require("type", ["int"])
    weights.require("actorder", [None])
    return weights.require("num_bits", [4, 8], default=None)
