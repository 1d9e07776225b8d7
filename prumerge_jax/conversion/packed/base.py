"""What the readers of quantised checkpoints have in common."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from prumerge_jax.conversion.tensor_files import ConversionError, TensorInfo
from prumerge_jax.models.quantisation import Format

Read = Callable[[str], np.ndarray]
"""Reads one tensor of the file by its name."""
Tensors = Mapping[str, TensorInfo]
MOST_NUMBERS = 1 << 32
"""Numbers of one weight at most: declared sizes are bounded before any array is made."""


class Codes(NamedTuple):
    """One kernel in one of our formats, in host memory; see `quantisation.Quantised`.

    Attributes:
      codes: [d_in, d_out].
      scale: [G, d_out] float32.
    """

    codes: np.ndarray
    scale: np.ndarray


class PackedLinear(Protocol):
    """The weight of one linear layer, [d_out, d_in], as several tensors of a file."""

    @property
    def shape(self) -> tuple[int, int]:
        """[d_out, d_in]."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its tensors."""

    def values(self, read: Read) -> np.ndarray:
        """[d_out, d_in] float32, by the file's own rule."""

    def codes_in(self, form: Format, read: Read) -> Codes | None:
        """The same numbers in a format of ours, where the file's is that format."""


def info_of(tensors: Tensors, name: str, dtypes: tuple[str, ...], rank: int) -> TensorInfo:
    """What a part must be.

    Raises:
      ConversionError: it is missing, or of another dtype or rank.
    """
    info = tensors.get(name)
    if info is None:
        raise ConversionError(f"{name[:160]} is missing; the checkpoint is incomplete")
    if str(info.dtype) not in dtypes or len(info.shape) != rank:
        raise ConversionError(
            f"{name[:160]}: {info.dtype} of shape {list(info.shape)}; expected "
            f"{' or '.join(dtypes)} of {rank} axes"
        )
    return info


def require_shape(tensors: Tensors, name: str, shape: tuple[int, ...]) -> None:
    """Raises ConversionError where a part has another shape."""
    if tensors[name].shape != shape:
        raise ConversionError(
            f"{name[:160]}: shape {list(tensors[name].shape)}, expected {list(shape)}"
        )


def split_words(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [..., n] -> uint8 [..., n, 32 / bits], lowest bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return ((words.view(np.uint32)[..., None] >> shifts) & ((1 << bits) - 1)).astype(np.uint8)


def finite(array: np.ndarray, name: str) -> np.ndarray:
    """The numbers as float32.

    Raises:
      ConversionError: NaN or infinity among them.
    """
    result = array.astype(np.float32)
    if not np.isfinite(result).all():
        raise ConversionError(f"{name[:160]}: holds NaN or infinity; the checkpoint is damaged")
    return result
