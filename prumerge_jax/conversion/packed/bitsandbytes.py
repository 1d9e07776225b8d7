"""Linear layers as bitsandbytes stores them: NF4 and FP4 in blocks, int8 by rows.

4 bit: bytes run over the row-major [d_out, d_in], the first of two numbers in the high half; blocks
run the same way. Absolute maxima may be quantised themselves ("nested"). int8: `W = q * SCB / 127`.
Rules: bitsandbytes/functional.py (`QuantState`, `dequantize_4bit`, `int8_vectorwise_dequant`),
version 0.50.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from prumerge_jax.conversion.packed.base import (
    MOST_NUMBERS,
    Codes,
    PackedLinear,
    Read,
    Tensors,
    finite,
    info_of,
    require_shape,
)
from prumerge_jax.conversion.tensor_files import ConversionError
from prumerge_jax.families.fields import Section
from prumerge_jax.models.quantisation import NF4_CODES, Format
from prumerge_jax.store.strict_json import parse_json

_STATE = ".quant_state.bitsandbytes__"
_MAX_STATE_BYTES = 4096
_ONE_OF_127 = np.float32(7.874015718698502e-3)
_BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)


@dataclasses.dataclass(frozen=True)
class _FourBit:
    """Attributes: `name` of the weight; `state`, the name of what describes it; `nested_block` and
    `offset` of quantised maxima, 0 where they are not."""

    name: str
    state: str
    shape: tuple[int, int]
    block: int
    nested_block: int
    offset: float

    @property
    def parts(self) -> tuple[str, ...]:
        nested = ("nested_absmax", "nested_quant_map") if self.nested_block else ()
        own = (f"{self.name}.{part}" for part in ("absmax", "quant_map", *nested))
        return (self.name, self.state, *own)

    def values(self, read: Read) -> np.ndarray:
        count = math.prod(self.shape)
        table = finite(read(f"{self.name}.quant_map"), f"{self.name}.quant_map")
        scale = np.repeat(self._maxima(read), self.block)[:count]
        return (table[self._codes(read)] * scale).reshape(self.shape)

    def codes_in(self, form: Format, read: Read) -> Codes | None:
        rows, columns = self.shape
        if form.block != self.block or columns % self.block:
            return None
        if not np.array_equal(read(f"{self.name}.quant_map"), NF4_CODES):
            return None
        codes = self._codes(read).reshape(self.shape).T
        scale = self._maxima(read).reshape(rows, columns // self.block).T
        return Codes(codes.astype(form.codes), scale)

    def _codes(self, read: Read) -> np.ndarray:
        packed = read(self.name).reshape(-1)
        return np.stack([packed >> 4, packed & 15], -1).reshape(-1)[: math.prod(self.shape)]

    def _maxima(self, read: Read) -> np.ndarray:
        """Absolute maximum of every block, float32."""
        name = f"{self.name}.absmax"
        maxima = read(name).reshape(-1)
        if not self.nested_block:
            return finite(maxima, name)
        table = finite(read(f"{self.name}.nested_quant_map"), f"{self.name}.nested_quant_map")
        outer = finite(read(f"{self.name}.nested_absmax"), f"{self.name}.nested_absmax")
        scale = np.repeat(outer, self.nested_block)[: len(maxima)]
        return table[maxima] * scale + np.float32(self.offset)


@dataclasses.dataclass(frozen=True)
class _Int8:
    """Attributes: `name` of the weight, `scb` of its row maxima, `others` of what says nothing."""

    name: str
    scb: str
    shape: tuple[int, int]
    others: tuple[str, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.name, self.scb, *self.others)

    def values(self, read: Read) -> np.ndarray:
        # In this order the library's bits, of which `codes_in` may differ in the last one.
        return read(self.name) * self._maxima(read)[:, None] * _ONE_OF_127

    def codes_in(self, form: Format, read: Read) -> Codes | None:
        if form.stored_as != "int8":
            return None
        scale = self._maxima(read)[None] / np.float32(127)
        return Codes(np.ascontiguousarray(read(self.name).T), scale)

    def _maxima(self, read: Read) -> np.ndarray:
        return finite(read(self.scb), self.scb)


def find(config: Section, tensors: Tensors, read: Read) -> dict[str, PackedLinear]:
    """The linear layers that bitsandbytes quantised, by the name of their weight."""
    found: dict[str, PackedLinear] = {}
    for name in tensors:
        if _STATE in name:
            linear = _four_bit(name, tensors, read)
            found[linear.name] = linear
        elif name.endswith(".SCB"):
            eight = _int8(name, tensors)
            found[eight.name] = eight
    return found


def _int8(scb: str, tensors: Tensors) -> _Int8:
    stem = scb.removesuffix("SCB")
    rows, columns = info_of(tensors, f"{stem}weight", ("int8",), 2).shape
    info_of(tensors, scb, ("float32",), 1)
    require_shape(tensors, scb, (rows,))
    others = (f"{stem}weight_format",) if f"{stem}weight_format" in tensors else ()
    return _Int8(f"{stem}weight", scb, (rows, columns), others)


def _four_bit(state: str, tensors: Tensors, read: Read) -> _FourBit:
    name = state.partition(_STATE)[0]
    kind = state.partition(_STATE)[2]
    values = _parse_state(state, kind, tensors, read)
    shape, block = values["shape"], values["blocksize"]
    count = math.prod(shape)
    info_of(tensors, name, ("uint8",), 2)
    require_shape(tensors, name, (-(-count // 2), 1))
    info_of(tensors, f"{name}.quant_map", ("float32",), 1)
    require_shape(tensors, f"{name}.quant_map", (16,))
    blocks = -(-count // block)
    nested, offset = values.get("nested_blocksize", 0), values.get("nested_offset", 0.0)
    info_of(tensors, f"{name}.absmax", ("uint8",) if nested else ("float32",), 1)
    require_shape(tensors, f"{name}.absmax", (blocks,))
    if nested:
        for part, shape_of_part in (("quant_map", (256,)), ("absmax", (-(-blocks // nested),))):
            info_of(tensors, f"{name}.nested_{part}", ("float32",), 1)
            require_shape(tensors, f"{name}.nested_{part}", shape_of_part)
    return _FourBit(name, state, (shape[0], shape[1]), block, nested, float(offset))


def _parse_state(state: str, kind: str, tensors: Tensors, read: Read) -> dict[str, Any]:
    """The JSON that describes a weight, every number of it bounded.

    Raises:
      ConversionError: it is too long, malformed or out of bounds.
    """
    info = info_of(tensors, state, ("uint8",), 1)
    if info.nbytes > _MAX_STATE_BYTES:
        raise ConversionError(f"{state[:160]}: {info.nbytes} bytes; expected {_MAX_STATE_BYTES}")
    try:
        values = parse_json(read(state).tobytes(), state[:160])
    except ValueError as error:
        raise ConversionError(str(error)) from None
    section = Section(values, state[:160])
    section.require("quant_type", [kind])
    if kind not in ("nf4", "fp4"):
        raise ConversionError(f"{state[:160]}: quant_type {kind!r:.80}; expected nf4 or fp4")
    section.require("blocksize", _BLOCKS)
    shape = section.get("shape", list, [])
    if (
        len(shape) != 2
        or not all(type(side) is int and 1 <= side < MOST_NUMBERS for side in shape)
        or math.prod(shape) > MOST_NUMBERS
    ):
        raise ConversionError(f"{state[:160]}: shape {shape!r:.80}; expected [d_out, d_in]")
    if "nested_blocksize" in section.values:
        section.require("nested_blocksize", _BLOCKS)
        if not math.isfinite(section.get("nested_offset", float, 0.0)):
            raise ConversionError(f"{state[:160]}: nested_offset is not finite")
    return dict(section.values)
