"""Bits per number of each class of tensor."""

import dataclasses

import jax.numpy as jnp

from prumerge_jax.models.quantisation import format_named, named_cache_dtype

SCALE_BITS = 32


@dataclasses.dataclass(frozen=True)
class Bits:
    """How a model is held; its tower, projector, embedding, head, norms and activations have 16.

    Attributes:
      kernels: per weight of the decoder's blocks, scales of blocks included; those of output
        channels, some 0.01 bits, are not.
      cache: per number of keys and values; 8 means a scale per token and head in addition.
      int8_products: whether the products of the blocks, `down_proj` aside, are of int8 numbers.
    """

    kernels: float = 16
    cache: int = 16
    int8_products: bool = False

    @classmethod
    def of(cls, quantize: str | None = None, cache_dtype: str | None = None) -> "Bits":
        """Those of a format of kernels and a dtype of keys and values, as users name them.

        Raises:
          ValueError: an unknown format or dtype.
        """
        cache = 16 if named_cache_dtype(cache_dtype) is None else 8
        if quantize is None:
            return cls(cache=cache)
        form = format_named(quantize)
        scales = SCALE_BITS / form.block if form.block else 0
        return cls(jnp.iinfo(form.codes).bits + scales, cache, form.dynamic)


PLAIN = Bits()
"""Everything at 16."""
