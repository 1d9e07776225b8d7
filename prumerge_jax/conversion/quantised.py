"""Kernels quantised while a checkpoint is read, one layer in memory at a time."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prumerge_jax.conversion import keys
from prumerge_jax.conversion.keys import Weight
from prumerge_jax.conversion.packed import Codes, PackedCheckpoint
from prumerge_jax.conversion.tensor_files import StoredTensor, Tensor
from prumerge_jax.models.config import TextConfig
from prumerge_jax.models.quantisation import Format, Quantised, dequantise, quantise

_SCALE_BYTES = 4


class _Layer(NamedTuple):
    """One layer's kernel, and sums of squares [] of its error and of its weights."""

    quantised: Quantised
    error: jax.Array
    weights: jax.Array


def quantised_kernels(text: TextConfig, form: Format | None) -> dict[str, int]:
    """Paths of the kernels that a format is for, and their bytes in it; none without a format."""
    sizes: dict[str, int] = {}
    if form is None:
        return sizes
    for name, (d_out, d_in) in keys.checkpoint_linears(text).items():
        scales = form.groups(d_in) * d_out * _SCALE_BYTES
        layer = d_in * d_out * jnp.iinfo(form.codes).bits // 8 + scales
        sizes[f"decoder.layers.{name}.kernel"] = text.num_layers * layer
    return sizes


def assemble_quantised(
    weight: Weight,
    tensors: Mapping[str, Tensor],
    form: Format,
    progress: Callable[[int], None],
) -> tuple[Codes, float]:
    """Reads the checkpoint tensors of one stacked kernel into codes and scales.

    What a checkpoint holds in this very format keeps its codes.

    Returns:
      The kernel, layers stacked on a leading axis, and its error: root mean square relative to
      that of the weights.

    Raises:
      ConversionError: NaN or infinity among the values.
    """
    layers, d_in, d_out = weight.shape
    result = Codes(
        np.empty(weight.shape, form.codes),
        np.empty((layers, form.groups(d_in), d_out), np.float32),
    )
    error = weights = 0.0
    for layer, key in enumerate(weight.keys):
        tensor = tensors[key]
        exact = _stored_codes(tensor, form)
        if exact is not None:
            result.codes[layer], result.scale[layer] = exact.codes, exact.scale
        else:
            made = _quantised(tensor.read(), form)
            result.codes[layer], result.scale[layer] = map(np.asarray, made.quantised)
            error, weights = error + float(made.error), weights + float(made.weights)
        progress(tensor.info.nbytes)
    return result, math.sqrt(error / weights) if weights else 0.0


def _stored_codes(tensor: Tensor, form: Format) -> Codes | None:
    """What a checkpoint holds in this very format."""
    if isinstance(tensor, StoredTensor) and isinstance(tensor.checkpoint, PackedCheckpoint):
        return tensor.checkpoint.codes_in(tensor.key, form)
    return None


@functools.partial(jax.jit, static_argnames="form")
def _quantised(tensor: jax.Array, form: Format) -> _Layer:
    """A checkpoint's tensor [d_out, d_in] as a kernel."""
    kernel = tensor.astype(jnp.float32).T
    quantised = quantise(kernel, form)
    error = jnp.square(dequantise(quantised, form) - kernel).sum()
    return _Layer(quantised, error, jnp.square(kernel).sum())
