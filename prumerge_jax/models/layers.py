"""Linear layers with optional low-rank adapters, norms, and layer stacks.

Weights are created in float32; loading or casting the state decides what is stored. A layer
computes in the dtype of its input.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from prumerge_jax.models import tuning
from prumerge_jax.models.dropout import bernoulli_mask
from prumerge_jax.models.products import computed_apart, contract
from prumerge_jax.models.quantisation import (
    Format,
    Quantised,
    QuantParam,
    product,
    quantise,
)
from prumerge_jax.models.remat import ADAPTER, PRODUCT, WIDE
from prumerge_jax.sharding.mesh import Axes, unshard_embed

# Scaled by the fan-in: the usual 0.02 at LLaMA's widths, with which a small model hardly trains.
_fan_in = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
# PEFT's default for A: Kaiming uniform with a = sqrt(5), that is uniform within 1/sqrt(fan_in).
_kaiming = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685) on every linear layer of the decoder.

    The output of a linear layer becomes `x W + alpha / rank * dropout(x) A B`. `dropout` applies
    only where a dropout key is given, that is in training.
    """

    rank: int = 128
    alpha: float = 256.0
    dropout: float = 0.05

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"adapter rank is {self.rank}; expected at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter dropout is {self.dropout}; expected 0 <= dropout < 1")

    @property
    def scale(self) -> float:
        """The factor alpha / rank."""
        return self.alpha / self.rank


class LoRAParam(nnx.Variable):
    """An adapter weight. Not an `nnx.Param`, so that filters can tell base and adapter apart."""


class Linear(nnx.Module):
    """`x W + b`, plus a low-rank adapter where one is configured.

    Attributes:
      kernel: [d_in, d_out], the transpose of PyTorch's weight; [d_out, d_in] with `out_first`.
      kernel_q, kernel_scale: in place of `kernel`, its codes and scales (`quantisation.Quantised`)
        in the format `quantize`.
      out_first: whether the kernel is kept the other way round, see `put_out_first`.
      kept_as: name of its output for `remat.rematerialise`; None for queries, keys and values,
        which attention names.
      bias: [d_out] or None.
      lora_a, lora_b: [d_in, rank] and [rank, d_out]; absent without an adapter.
    """

    kernel_q: QuantParam
    kernel_scale: QuantParam

    def __init__(
        self,
        d_in: int,
        d_out: int,
        axes: Axes,
        *,
        bias: bool = False,
        adapter: AdapterConfig | None = None,
        quantize: Format | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.axes = axes
        kept: dict[Axes, str | None] = {("embed", "mlp"): WIDE, ("embed", "heads"): None}
        self.kept_as = kept.get(axes, PRODUCT)
        self.quantize = quantize
        self.out_first = False
        kernel = _fan_in(rngs.params(), (d_in, d_out))
        if quantize is None:
            self.kernel = nnx.Param(kernel, out_sharding=axes)
        else:
            for (name, its_axes), array in zip(
                self._kernel_axes().items(), quantise(kernel, quantize), strict=True
            ):
                setattr(self, name, QuantParam(array, out_sharding=its_axes))
        self.bias = nnx.Param(jnp.zeros((d_out,)), out_sharding=axes[1:]) if bias else None
        self.adapter = adapter
        if adapter is not None:
            a = _kaiming(rngs.params(), (d_in, adapter.rank))
            b = jnp.zeros((adapter.rank, d_out))
            self.lora_a = LoRAParam(a, out_sharding=(f"adapter_{axes[0]}", None))
            self.lora_b = LoRAParam(b, out_sharding=(None, f"adapter_{axes[1]}"))

    def __call__(self, x: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """[..., d_in] -> [..., d_out] in the dtype of `x`."""
        return outputs_of([self], x, dropout_key)[0]

    def without_adapter(self, x: jax.Array) -> jax.Array:
        """[..., d_in] -> [..., d_out], without what the adapter adds."""
        y = self._product(x)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)

    def kept(self, y: jax.Array) -> jax.Array:
        """The output under the name by which it is kept."""
        return y if self.kept_as is None else checkpoint_name(y, self.kept_as)

    @property
    def is_wide(self) -> bool:
        """Whether d_out is larger than d_in, of a kernel [d_in, d_out] without `quantize`."""
        d_in, d_out = self.kernel.shape[-2:]
        return d_out > d_in

    def put_out_first(self) -> list[jax.Array]:
        """Keeps the kernel, or a stack of them, as [d_out, d_in] from now on.

        Returns:
          The arrays that held it, which the layer needs no longer.
        """
        held = []
        for name, axes in self._kernel_axes().items():
            weight = getattr(self, name)
            kernel = weight[...]
            axes = (None,) * (kernel.ndim - 2) + axes[::-1]
            with nnx.use_eager_sharding(False):
                turned = type(weight)(jnp.matrix_transpose(kernel), out_sharding=axes)
            setattr(self, name, turned)
            held.append(kernel)
        self.out_first = True
        return held

    def _kernel_axes(self) -> dict[str, Axes]:
        """Logical axes of what holds the kernel, by attribute, as for [d_in, d_out]."""
        if self.quantize is None:
            return {"kernel": self.axes}
        groups = self.axes[0] if self.quantize.block else None
        return {"kernel_q": self.axes, "kernel_scale": (groups, self.axes[1])}

    def gathered_kernel(self, dtype: jnp.dtype) -> jax.Array:
        """The kernel in this dtype as a product reads it, without `quantize`."""
        return self._gathered(self.kernel[...].astype(dtype), self.axes)

    def _gathered(self, weight: jax.Array, axes: Axes) -> jax.Array:
        return unshard_embed(weight, *(axes[::-1] if self.out_first else axes))

    def _product(self, x: jax.Array) -> jax.Array:
        """`x W`."""
        if self.quantize is None:
            return contract(x, self.gathered_kernel(x.dtype), out_first=self.out_first)
        axes = self._kernel_axes()
        quantised = Quantised(
            self._gathered(self.kernel_q[...], axes["kernel_q"]),
            self._gathered(self.kernel_scale[...], axes["kernel_scale"]),
        )
        return product(x, quantised, self.quantize, out_first=self.out_first)


def outputs_of(
    linears: Sequence[Linear], x: jax.Array, dropout_key: jax.Array | None = None
) -> list[jax.Array]:
    """Outputs [..., d_out] of linear layers that have one input [..., d_in].

    The first factors of their adapters are one product, and dropout draws one mask for all of them.

    Args:
      linears: with adapters of one configuration, or without any.
      x: their input.
      dropout_key: where given, the adapters drop their input (training).
    """
    # In this order: with the adapters in front XLA on TPUs transposes an MLP's gradients, and what
    # they meet; for 7B forward and backward then take 5.5 million cycles of a v6e, and else 4.9.
    outputs = [linear.without_adapter(x) for linear in linears]
    if linears[0].adapter is not None:
        with jax.named_scope("adapter"):
            additions = _additions(linears, x, dropout_key)
            outputs = [y + addition for y, addition in zip(outputs, additions, strict=True)]
    return [linear.kept(y) for linear, y in zip(linears, outputs, strict=True)]


def _additions(
    linears: Sequence[Linear], x: jax.Array, dropout_key: jax.Array | None
) -> list[jax.Array]:
    """What the adapters of some layers of the same input add to their outputs."""
    adapter, axes = linears[0].adapter, linears[0].axes
    assert adapter is not None
    apart = tuning.current().adapter_barrier
    scale = adapter.scale
    if dropout_key is not None and adapter.dropout:
        keep = 1 - adapter.dropout
        x = jnp.where(bernoulli_mask(dropout_key, keep, x.shape), x, 0)
        scale = scale / keep
    first = jnp.concatenate([linear.lora_a[...].astype(x.dtype) for linear in linears], axis=-1)
    narrow = checkpoint_name(x @ unshard_embed(first, axes[0], None), ADAPTER)
    additions = []
    for linear, part in zip(linears, jnp.split(narrow, len(linears), axis=-1), strict=True):
        second = unshard_embed(linear.lora_b[...].astype(x.dtype), None, linear.axes[1])
        addition = scale * (part @ second)
        additions.append(computed_apart(addition) if apart else addition)
    return additions


class RMSNorm(nnx.Module):
    """LLaMA's norm: computed in float32, scaled after the cast back (modeling_llama.py)."""

    def __init__(self, width: int, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones((width,)), out_sharding=(None,))
        self.eps = eps

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        f = x.astype(jnp.float32)
        f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + self.eps)
        return f.astype(x.dtype) * self.scale[...].astype(x.dtype)


class LayerNorm(nnx.Module):
    """CLIP's norm, computed in float32."""

    def __init__(self, width: int, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones((width,)), out_sharding=(None,))
        self.bias = nnx.Param(jnp.zeros((width,)), out_sharding=(None,))
        self.eps = eps

    @jax.named_scope("norm")
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        f = x.astype(jnp.float32)
        f = f - f.mean(axis=-1, keepdims=True)
        f = f * jax.lax.rsqrt(jnp.mean(f * f, axis=-1, keepdims=True) + self.eps)
        f = f * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return f.astype(x.dtype)


Layer = TypeVar("Layer", bound=nnx.Module)


def stack(make_layer: Callable[[nnx.Rngs], Layer], num_layers: int, rngs: nnx.Rngs) -> Layer:
    """One module whose weights carry a leading, unsharded axis of `num_layers`."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def make(rngs: nnx.Rngs) -> Layer:
        return make_layer(rngs)

    return make(rngs)
