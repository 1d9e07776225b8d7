"""Kernels of fewer bits: the formats, how a kernel is brought into one, and its products.

A kernel [d_in, d_out] becomes codes of the same shape and scales [G, d_out]: G is 1 where all of an
output channel shares a scale, d_in / 64 where blocks do. Layers may be stacked on leading axes.
Group-wise int4 is not among the formats: without a kernel of its own XLA expands it to 16 bits in
memory, and it is slower than 16 bits (docs/quantisation.md).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prumerge_jax.messages import quoted
from prumerge_jax.models.products import FEW_ROWS, contract
from prumerge_jax.options import unknown

NF4_BLOCK = 64
"""Rows of a channel that share a scale in NF4 (QLoRA, arXiv 2305.14314)."""
NF4_CODES = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
"""The 16 values of NF4, as bitsandbytes writes them (`quant_map`)."""
_CHANNELS = 256
"""Channels that are converted at a time: a product of 2048 x 5632 with one row took 0.9 ms of two
cores, with 64 channels 1.7, in float32 2.3, converted as a whole 36."""
_INT4_STEPS = 21
"""Scales that int4 tries for a channel, from half of the largest to all of it."""


class QuantParam(nnx.Variable):
    """Codes or scales of a kernel. Not an `nnx.Param`: it never trains, is never cast, and filters
    can tell it apart."""


class Quantised(NamedTuple):
    """A kernel of fewer bits.

    Attributes:
      codes: [..., d_in, d_out], integers.
      scale: [..., G, d_out] float32.
    """

    codes: jax.Array
    scale: jax.Array


@dataclasses.dataclass(frozen=True)
class Format:
    """A format of kernels.

    Attributes:
      name: as in `--quantize`.
      codes: dtype of the codes.
      quantise: one kernel [d_in, d_out] float32 -> its codes and scales.
      block: rows that share a scale; None for all of a channel.
      values: what the codes stand for, in units of their scale; None for themselves.
      dynamic: whether activations are rounded to int8 too, each token by its own scale.
      stored_as: name of the format in which a directory holds it.
    """

    name: str
    codes: jnp.dtype
    quantise: Callable[[jax.Array], Quantised]
    block: int | None = None
    values: tuple[float, ...] | None = None
    dynamic: bool = False
    stored_as: str = ""

    def groups(self, d_in: int) -> int:
        """G: number of scales per channel; the last block may be shorter than the others."""
        return 1 if self.block is None else -(-d_in // self.block)


def _int8(kernel: jax.Array) -> Quantised:
    """Symmetric: a channel's largest weight becomes 127."""
    scale = _scale(jnp.abs(kernel).max(0, keepdims=True), 127)
    return Quantised(jnp.clip(jnp.round(kernel / scale), -127, 127).astype(jnp.int8), scale)


def _int4(kernel: jax.Array) -> Quantised:
    """Symmetric; of `_INT4_STEPS` scales the one of least squared error, the largest of several."""
    largest = _scale(jnp.abs(kernel).max(0, keepdims=True), 7)

    def codes(scale: jax.Array) -> jax.Array:
        return jnp.clip(jnp.round(kernel / scale), -8, 7)

    def step(best: tuple[jax.Array, jax.Array], share: jax.Array) -> tuple[tuple, None]:
        least, kept = best
        scale = share * largest
        error = jnp.square(codes(scale) * scale - kernel).sum(0, keepdims=True)
        return (jnp.minimum(error, least), jnp.where(error < least, scale, kept)), None

    shares = jnp.asarray(np.linspace(1, 0.5, _INT4_STEPS, dtype=np.float32))
    (_, scale), _ = jax.lax.scan(step, (jnp.full_like(largest, jnp.inf), largest), shares)
    return Quantised(codes(scale).astype(jnp.int4), scale)


def _nf4(kernel: jax.Array) -> Quantised:
    """The nearest of 16 quantiles of a normal distribution, in blocks of 64 rows."""
    d_in, d_out = kernel.shape
    padded = jnp.pad(kernel, ((0, -d_in % NF4_BLOCK), (0, 0)))
    blocks = padded.reshape(-1, NF4_BLOCK, d_out)
    scale = _scale(jnp.abs(blocks).max(1), 1)
    share = blocks / scale[:, None]
    codes = jnp.zeros(share.shape, jnp.uint8)
    for boundary in (NF4_CODES[1:] + NF4_CODES[:-1]) / 2:
        codes += share > boundary
    return Quantised(codes.reshape(-1, d_out)[:d_in].astype(jnp.uint4), scale)


def _scale(largest: jax.Array, steps: int) -> jax.Array:
    """largest / steps, as a product with the reciprocal: XLA makes that of a division by a constant
    in some programs and not in others. 1 where all weights are zero."""
    return jnp.where(largest > 0, largest * np.float32(1 / steps), 1)


FORMATS = {
    form.name: form
    for form in (
        Format("int8", jnp.dtype(jnp.int8), _int8, stored_as="int8"),
        Format("int8x8", jnp.dtype(jnp.int8), _int8, dynamic=True, stored_as="int8"),
        Format("int4", jnp.dtype(jnp.int4), _int4, stored_as="int4"),
        Format(
            "nf4",
            jnp.dtype(jnp.uint4),
            _nf4,
            block=NF4_BLOCK,
            values=tuple(float(value) for value in NF4_CODES),
            stored_as="nf4",
        ),
    )
}
"""The formats by name. int8 and int8x8 are the same weights."""


def format_named(name: str) -> Format:
    """A format.

    Raises:
      ValueError: there is none of this name.
    """
    if name not in FORMATS:
        raise ValueError(unknown("quantize: unknown format", name, FORMATS))
    return FORMATS[name]


def named_cache_dtype(name: str | None) -> jnp.dtype | None:
    """The dtype of keys and values in pages that a user names; None keeps that of computation.

    Raises:
      ValueError: another name than int8.
    """
    if name not in (None, "int8"):
        raise ValueError(f"cache_dtype is {quoted(name)}; expected int8, or None")
    return None if name is None else jnp.dtype(jnp.int8)


def quantise(kernel: jax.Array, form: Format) -> Quantised:
    """Kernels [..., d_in, d_out] in a format; one at a time is float32."""
    if kernel.ndim == 2:
        return form.quantise(kernel.astype(jnp.float32))
    return jax.lax.map(lambda each: quantise(each, form), kernel)


def dequantise(kernel: Quantised, form: Format, *, out_first: bool = False) -> jax.Array:
    """What codes and scales stand for, float32."""
    codes, scale = kernel
    values = _values(codes, form)
    if form.block is None:
        return values * scale
    axis = values.ndim - (1 if out_first else 2)
    of_weights = jnp.repeat(scale, form.block, axis=axis)
    return values * jax.lax.slice_in_dim(of_weights, 0, values.shape[axis], axis=axis)


def _values(codes: jax.Array, form: Format) -> jax.Array:
    """Codes in units of their scale, float32; chosen bit by bit, which compilers fuse where they
    make a copy of a table's look-up."""
    if form.values is None:
        return codes.astype(jnp.float32)
    codes = codes.astype(jnp.uint8)
    chosen = [jnp.float32(value) for value in form.values]
    bit = 1
    while len(chosen) > 1:
        is_set = (codes & bit) > 0
        pairs = zip(chosen[::2], chosen[1::2], strict=True)
        chosen = [jnp.where(is_set, high, low) for low, high in pairs]
        bit *= 2
    return chosen[0]


def product(x: jax.Array, kernel: Quantised, form: Format, *, out_first: bool) -> jax.Array:
    """`x W`, [..., d_in] -> [..., d_out] in the dtype of `x`.

    Args:
      x: activations.
      kernel: codes [d_in, d_out] and scales [G, d_out]; with `out_first` both the other way round.
      form: its format.
      out_first: see `Linear`.
    """
    codes, scale = kernel
    if out_first and not form.dynamic and _is_few(x):
        return _by_channels(x, kernel, form)
    per_channel = scale.reshape(-1)
    if form.dynamic:
        return _dynamic(x, codes, per_channel, out_first).astype(x.dtype)
    if form.block is not None or x.dtype == jnp.float16:
        # Scaled before, for sums of products with codes overflow float16.
        weight = dequantise(kernel, form, out_first=out_first).astype(x.dtype)
        return contract(x, weight, out_first=out_first)
    # Scaled behind the product, so that the conversion of the codes becomes part of it.
    y = contract(x, codes.astype(x.dtype), out_first=out_first)
    return (y.astype(jnp.float32) * per_channel).astype(x.dtype)


def _is_few(x: jax.Array) -> bool:
    """Whether a product is of few rows on one device: float32, as CPUs compute."""
    is_alone = jax.sharding.get_abstract_mesh().empty
    return is_alone and x.dtype == jnp.float32 and math.prod(x.shape[:-1]) < FEW_ROWS


def _by_channels(x: jax.Array, kernel: Quantised, form: Format) -> jax.Array:
    """`product` with codes [d_out, d_in], `_CHANNELS` at a time.

    XLA on CPUs converts a kernel as a whole before it multiplies, through memory; what it converts
    here is still in the cache.
    """
    codes = kernel.codes
    rows, channels = x.reshape(-1, x.shape[-1]), math.gcd(len(codes), _CHANNELS)

    def some(_: None, part: Quantised) -> tuple[None, jax.Array]:
        return None, rows @ dequantise(part, form, out_first=True).T

    parts = jax.tree.map(lambda whole: whole.reshape(-1, channels, whole.shape[-1]), kernel)
    _, y = jax.lax.scan(some, None, parts)  # [d_out / channels, rows, channels]
    return y.swapaxes(0, 1).reshape(*x.shape[:-1], len(codes))


def _dynamic(x: jax.Array, codes: jax.Array, scale: jax.Array, out_first: bool) -> jax.Array:
    """The product of int8 numbers, float32: each token by the scale of its own largest value."""
    x = x.astype(jnp.float32)
    of_token = _scale(jnp.abs(x).max(-1, keepdims=True), 127)
    rounded = jnp.clip(jnp.round(x / of_token), -127, 127).astype(jnp.int8)
    axis = 1 if out_first else 0
    sums = jax.lax.dot_general(
        rounded,
        codes,
        (((x.ndim - 1,), (axis,)), ((), ())),
        preferred_element_type=jnp.int32,
    )
    return sums.astype(jnp.float32) * of_token * scale
