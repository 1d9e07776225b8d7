"""Linear layers as AutoGPTQ and GPTQModel store them, and as AutoAWQ does (GEMM).

GPTQ: `qweight` int32 [d_in / n, d_out] holds n numbers along d_in, lowest bits first; `qzeros`
int32 [G, d_out / n]; `scales` [G, d_out]; zeros are stored less one in format `gptq`, as they are
in `gptq_v2`. AWQ: `qweight` int32 [d_in, d_out / 8], eight columns per word in the order 0 2 4 6 1
3 5 7, and so are `qzeros`. Both: `W = (q - z) * scale` of the row's group.
"""

import dataclasses

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

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclasses.dataclass(frozen=True)
class _Grouped:
    """Attributes: `stem` of the names; `group`, rows that share a scale; `bits`; `zero_offset`,
    what is added to stored zeros; `awq`, whether columns are packed, and not rows."""

    stem: str
    shape: tuple[int, int]
    group: int
    bits: int
    zero_offset: int
    awq: bool
    others: tuple[str, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        return (*(self.stem + part for part in ("qweight", "qzeros", "scales")), *self.others)

    def values(self, read: Read) -> np.ndarray:
        d_out, d_in = self.shape
        scales = finite(read(f"{self.stem}scales"), f"{self.stem}scales")
        words, zeros = read(f"{self.stem}qweight"), read(f"{self.stem}qzeros")
        if self.awq:
            codes, zeros = _awq_columns(words), _awq_columns(zeros)
        else:
            codes = split_words(words, self.bits).swapaxes(1, 2).reshape(d_in, d_out)
            zeros = split_words(zeros, self.bits).reshape(len(scales), d_out)
        shifts = zeros.astype(np.float32) + self.zero_offset
        kernel = codes.astype(np.float32) - np.repeat(shifts, self.group, 0)[:d_in]
        kernel *= np.repeat(scales, self.group, 0)[:d_in]
        return kernel.T

    def codes_in(self, form: Format, read: Read) -> Codes | None:
        return None  # groups and zeros are none of our formats'


def _awq_columns(words: np.ndarray) -> np.ndarray:
    """int32 [n, m] -> uint8 [n, 8 m]."""
    numbers = split_words(words, 4)
    columns = np.empty_like(numbers)
    columns[..., list(_AWQ_ORDER)] = numbers
    return columns.reshape(len(words), -1)


def find_gptq(config: Section, tensors: Tensors, read: Read) -> dict[str, PackedLinear]:
    """The linear layers that GPTQ quantised, by the name of their weight.

    Raises:
      ConversionError: with act-order, other bits than 4 or 8, or parts that do not fit.
    """
    bits = config.require("bits", [4, 8], default=None)
    config.require("desc_act", [False])
    stored = config.require("checkpoint_format", ["gptq", "gptq_v2"])
    group = _group(config)
    found: dict[str, PackedLinear] = {}
    for stem in _stems(tensors):
        words, d_out = info_of(tensors, f"{stem}qweight", ("int32",), 2).shape
        d_in, per_word = words * 32 // bits, 32 // bits
        size = group or d_in
        _check(tensors, stem, d_in, d_out, size, per_word)
        others: list[str] = []
        if (index := f"{stem}g_idx") in tensors:
            info_of(tensors, index, ("int32",), 1)
            require_shape(tensors, index, (d_in,))
            if not np.array_equal(read(index), np.arange(d_in) // size):
                raise ConversionError(
                    f"{index[:160]}: rows are reordered (act-order), not supported"
                )
            others = [index]
        offset = 1 if stored == "gptq" else 0
        found[f"{stem}weight"] = _Grouped(
            stem, (d_out, d_in), size, bits, offset, awq=False, others=tuple(others)
        )
    return found


def find_awq(config: Section, tensors: Tensors, read: Read) -> dict[str, PackedLinear]:
    """The linear layers that AWQ quantised, by the name of their weight; errors as above."""
    config.require("bits", [4], default=None)
    version = config.get("version", str, "gemm")
    if version.lower() != "gemm":
        raise ConversionError(f"{config.where}: version {version!r:.80}; expected 'gemm'")
    config.require("zero_point", [True])
    group = _group(config)
    found: dict[str, PackedLinear] = {}
    for stem in _stems(tensors):
        d_in, words = info_of(tensors, f"{stem}qweight", ("int32",), 2).shape
        size = group or d_in
        _check(tensors, stem, d_in, words * 8, size, 8)
        found[f"{stem}weight"] = _Grouped(stem, (words * 8, d_in), size, 4, 0, awq=True, others=())
    return found


def _stems(tensors: Tensors) -> list[str]:
    return [name.removesuffix("qweight") for name in tensors if name.endswith(".qweight")]


def _group(config: Section) -> int:
    """Rows of a group; 0 for all."""
    group = config.get("group_size", int, 128)
    if group != -1 and not 8 <= group <= 1 << 16:
        raise ConversionError(f"{config.where}: group_size {group}; expected -1 or 8 to 65536")
    return max(group, 0)


def _check(tensors: Tensors, stem: str, d_in: int, d_out: int, group: int, per_word: int) -> None:
    """Raises ConversionError where zeros and scales do not fit the weight."""
    groups = -(-d_in // group)
    info_of(tensors, f"{stem}qzeros", ("int32",), 2)
    require_shape(tensors, f"{stem}qzeros", (groups, d_out // per_word))
    info_of(tensors, f"{stem}scales", ("float16", "bfloat16", "float32"), 2)
    require_shape(tensors, f"{stem}scales", (groups, d_out))
