"""A quantised checkpoint as one of plain weights, which are unpacked as they are read."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from prumerge_jax.conversion.packed import bitsandbytes, compressed_tensors, gptq
from prumerge_jax.conversion.packed.base import Codes, PackedLinear, Read, Tensors
from prumerge_jax.conversion.tensor_files import Checkpoint, ConversionError, TensorInfo
from prumerge_jax.families.fields import Section
from prumerge_jax.models.quantisation import Format

_METHODS: dict[str, Callable[[Section, Tensors, Read], dict[str, PackedLinear]]] = {
    "bitsandbytes": bitsandbytes.find,
    "gptq": gptq.find_gptq,
    "awq": gptq.find_awq,
    "compressed-tensors": compressed_tensors.find,
}
_CONFIG = "quantization_config"
_DTYPES = ("float16", "bfloat16", "float32")


class PackedCheckpoint(Checkpoint):
    """The tensors of a quantised checkpoint under the names of the weights that they stand for.

    Attributes:
      method: who quantised it, as its configuration says.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        linears: Mapping[str, PackedLinear],
        dtype: np.dtype,
        method: str,
    ) -> None:
        """Takes a checkpoint and its quantised layers, which are stored as `dtype` unless another
        is asked for."""
        self.files = checkpoint.files
        self.method = method
        self._checkpoint, self._linears = checkpoint, linears
        consumed = {part for linear in linears.values() for part in linear.parts}
        self.tensors = {
            name: info for name, info in checkpoint.tensors.items() if name not in consumed
        }
        self.tensors |= {name: TensorInfo(each.shape, dtype) for name, each in linears.items()}

    def read(self, name: str) -> np.ndarray:
        """One weight; one that was quantised is float32."""
        if name in self._linears:
            return self._linears[name].values(self._checkpoint.read)
        return self._checkpoint.read(name)

    def codes_in(self, name: str, form: Format) -> Codes | None:
        """A weight in a format of ours, where the checkpoint holds it in that very format."""
        linear = self._linears.get(name)
        return None if linear is None else linear.codes_in(form, self._checkpoint.read)


def unpacked(checkpoint: Checkpoint, values: Mapping[str, Any], where: str) -> Checkpoint:
    """The checkpoint with quantised layers unpacked; itself where it has none.

    Args:
      checkpoint: as stored.
      values: its `config.json`.
      where: names that.

    Raises:
      ConversionError: a method that is not read, or parts that are missing or do not fit.
    """
    if values.get(_CONFIG) is None:
        return checkpoint
    section = Section(values, where).section(_CONFIG)
    method = section.get("quant_method", str, "")
    if method not in _METHODS:
        raise ConversionError(
            f"{section.where}: quant_method {method!r:.80}; expected one of {', '.join(_METHODS)}"
        )
    dtype = values.get("dtype", values.get("torch_dtype"))
    linears = _METHODS[method](section, checkpoint.tensors, checkpoint.read)
    if not linears:
        raise ConversionError(f"{where} says {method}, but no layer is quantised so")
    chosen = jnp.dtype(dtype if dtype in _DTYPES else "float16")
    return PackedCheckpoint(checkpoint, linears, chosen, method)


def without_packing(values: Mapping[str, Any]) -> dict[str, Any]:
    """A `config.json` without what `unpacked` reads of it."""
    return {name: value for name, value in values.items() if name != _CONFIG}
