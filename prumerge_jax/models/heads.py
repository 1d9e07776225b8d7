"""Projections split into heads, and put together again.

The attention kernel of TPUs takes heads first, [B, H, T, Dh], and a product gives [B, T, H * Dh].
XLA makes two copies of every change between them, by way of an array whose lanes are positions. But
a head of 128 is as wide as a register: its registers need only be read and written elsewhere, and
can be rotated on the way. That is the kernel here; its arrays are [B, T, H, Dh] to whoever uses
them, in a layout that has the heads first.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec

from prumerge_jax.models import tuning
from prumerge_jax.models.attention.shards import HEADS
from prumerge_jax.models.remat import ATTENTION
from prumerge_jax.models.rotary import Rotation, rotate
from prumerge_jax.sharding.mesh import divisible_spec, platform

_LANES = 128
"""Heads, and the tokens of a row, must be multiples."""
_MOST_TOKENS, _MOST_HEADS = 256, 8
"""Of a block of the kernel, which exists twice in a core's memory, coming and going."""


@jax.named_scope("heads")
def split_heads(projected: jax.Array, head_dim: int, by: Rotation | None = None) -> jax.Array:
    """[B, T, H * Dh] -> [B, T, H, Dh], rotated where there is a rotation.

    What the backward pass may keep of it is named `remat.ATTENTION`.
    """
    *rows, width = projected.shape
    shape = (*rows, width // head_dim, head_dim)
    if moves_heads(shape[-3], head_dim):
        run = functools.partial(_heads_first, head_dim)
        if not jax.sharding.get_abstract_mesh().empty:
            flat, first, rotation = _specs(shape)
            # The kernel does not declare its varying axes.
            run = jax.shard_map(run, in_specs=(flat, rotation), out_specs=first, check_vma=False)
        # Kept as it is projected: a product writes what is kept, and a kernel's output is copied.
        return run(checkpoint_name(projected, ATTENTION), by).swapaxes(1, 2)
    if by is None:
        return checkpoint_name(projected, ATTENTION).reshape(shape)
    return checkpoint_name(rotate(projected.reshape(shape), by), ATTENTION)


@jax.named_scope("heads")
def join_heads(heads: jax.Array) -> jax.Array:
    """[B, T, H, Dh] -> [B, T, H * Dh]."""
    if not moves_heads(heads.shape[1], heads.shape[3]):
        return heads.reshape(*heads.shape[:2], -1)
    run = _heads_last
    if not jax.sharding.get_abstract_mesh().empty:
        flat, first, _ = _specs(heads.shape)
        run = jax.shard_map(run, in_specs=first, out_specs=flat, check_vma=False)
    return run(heads.swapaxes(1, 2))


def moves_heads(length: int, head_dim: int) -> bool:
    """Whether the platform prefers the kernel, and it takes rows of this length and these heads."""
    whole = length % _LANES == 0 and head_dim % _LANES == 0
    return whole and tuning.current().heads == "kernel"


def _specs(shape: tuple[int, ...]) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """How a mesh splits [B, T, H * Dh], [B, H, T, Dh] and [B, T, Dh], by the [B, T, H, Dh] of all
    devices."""
    rows, _, heads, _ = divisible_spec(shape, *HEADS)
    return PartitionSpec(rows, None, heads), PartitionSpec(rows, heads), PartitionSpec(rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _heads_first(head_dim: int, x: jax.Array, by: Rotation | None) -> jax.Array:
    """[B, T, H * Dh] -> [B, H, T, Dh]."""
    return _moved(x, by, head_dim)


def _heads_first_forward(
    head_dim: int, x: jax.Array, by: Rotation | None
) -> tuple[jax.Array, Rotation | None]:
    return _moved(x, by, head_dim), by


def _heads_first_backward(
    head_dim: int, by: Rotation | None, gradient: jax.Array
) -> tuple[jax.Array, Rotation | None]:
    del head_dim
    back = None if by is None else Rotation(by.cos, -by.sin)
    return _moved(gradient, back), jax.tree.map(jnp.zeros_like, by)


_heads_first.defvjp(_heads_first_forward, _heads_first_backward)


@jax.custom_vjp
def _heads_last(x: jax.Array) -> jax.Array:
    """[B, H, T, Dh] -> [B, T, H * Dh]."""
    return _moved(x, None)


_heads_last.defvjp(
    lambda x: (_moved(x, None), x.shape[-1]),
    lambda head_dim, gradient: (_moved(gradient, None, head_dim),),
)


def _moved(x: jax.Array, by: Rotation | None, head_dim: int | None = None) -> jax.Array:
    """[B, T, H * Dh] -> [B, H, T, Dh] of this width, or without one the other way round; rotated
    where there is a rotation."""
    splits = head_dim is not None
    shape: tuple[int, ...]
    if head_dim is not None:
        batch, length, width = x.shape
        heads = width // head_dim
        shape = (batch, heads, length, head_dim)
    else:
        batch, heads, length, head_dim = x.shape
        shape = (batch, length, heads * head_dim)
    tokens = next(size for size in (_MOST_TOKENS, _LANES) if length % size == 0)
    at_once = next(size for size in range(_MOST_HEADS, 0, -1) if heads % size == 0)
    flat = pl.BlockSpec((1, tokens, at_once * head_dim), lambda b, t, h: (b, t, h))
    first = pl.BlockSpec((1, at_once, tokens, head_dim), lambda b, t, h: (b, h, t, 0))
    rotation = pl.BlockSpec((1, tokens, head_dim), lambda b, t, h: (b, t, 0))
    angles = () if by is None else tuple(by)
    return pl.pallas_call(
        functools.partial(_move_block, splits=splits),
        out_shape=jax.ShapeDtypeStruct(shape, x.dtype),
        grid=(batch, length // tokens, heads // at_once),
        in_specs=[flat if splits else first, *[rotation] * len(angles)],
        out_specs=first if splits else flat,
        interpret=platform() != "tpu",
    )(x, *angles)


def _move_block(x_ref: Any, *refs: Any, splits: bool) -> None:
    """One block: a head at a time, whose place is known when the kernel is compiled."""
    *angles, out_ref = refs
    heads, _, head_dim = (out_ref if splits else x_ref).shape[1:]
    for head in range(heads):
        lanes = slice(head * head_dim, (head + 1) * head_dim)
        x = x_ref[0, :, lanes] if splits else x_ref[0, head]
        if angles:
            cos, sin = (ref[0] for ref in angles)
            whole = x.astype(jnp.float32)
            x = (whole * cos + pltpu.roll(whole, head_dim // 2, 1) * sin).astype(x.dtype)
        if splits:
            out_ref[0, head] = x
        else:
            out_ref[0, :, lanes] = x
