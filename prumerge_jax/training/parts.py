"""The images of a batch encoded in parts: memory for a few, and time for those that are there."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from prumerge_jax.sharding.mesh import constrain, logical_spec
from prumerge_jax.sharding.processes import DataShards, to_global_array

CROPS_AT_A_TIME = 16
"""Crops of a data shard that are encoded at a time, at most. SigLIP's attention to 729 patches of
one takes 34 MB in float32."""


class EncoderInParts:
    """An encoder that is called for a part of every data shard's crops at a time.

    Args:
      encode: crops on the devices [b, S, S, 3] uint8, and what else it takes [b, ...] -> a tree of
        arrays [b, ...]; it is called with one b only for arrays of one size.
      mesh: the devices; every crop is kept on its data shard.
    """

    def __init__(self, encode: Callable[..., Any], mesh: Mesh) -> None:
        self._encode, self._mesh = encode, mesh
        self._shards = DataShards.of(mesh)
        batch = NamedSharding(mesh, logical_spec("batch"))
        self._zeros = jax.jit(self._nothing, static_argnums=(0, 1), out_shardings=batch)
        self._put = jax.jit(self._with_part, donate_argnums=0, out_shardings=batch)

    def __call__(self, *crops: np.ndarray, used: int) -> Any:
        """What the encoder makes of a batch, dispatched and not waited for.

        Args:
          *crops: its arguments [local B, ...], the rows of this process.
          used: how many rows of a data shard hold something, from its first one on, the most of all
            processes; the tree has zeros for parts without any.
        """
        of_shards = [x.reshape(len(self._shards.local), -1, *x.shape[1:]) for x in crops]
        rows = of_shards[0].shape[1]
        size = crops_at_a_time(rows)
        parts = [x[:, :size] for x in of_shards]
        shapes = tuple(self._shape(x) for x in parts)
        whole = self._zeros(shapes, rows)
        for start in range(0, used, size):
            # The last part reaches back: an array of its own size would be one more program.
            first = min(start, rows - size)
            part = [x[:, first : first + size].reshape(-1, *x.shape[2:]) for x in of_shards]
            encoded = self._encode(*(to_global_array(x, self._mesh) for x in part))
            whole = self._put(whole, encoded, np.int32(first))
        return whole

    def _shape(self, part: np.ndarray) -> jax.ShapeDtypeStruct:
        """The global shape of a part [local shards, b, ...]."""
        _, size, *inner = part.shape
        return jax.ShapeDtypeStruct((self._shards.total * size, *inner), part.dtype)

    def _nothing(self, part: tuple[jax.ShapeDtypeStruct, ...], rows: int) -> Any:
        """Zeros for `rows` crops of every data shard."""

        def zeros(of_part: jax.ShapeDtypeStruct) -> jax.Array:
            return jnp.zeros((self._shards.total * rows, *of_part.shape[1:]), of_part.dtype)

        return jax.tree.map(zeros, jax.eval_shape(self._encode, *part))

    def _with_part(self, whole: Any, part: Any, first: jax.Array) -> Any:
        """The tree with what was made of a part, from row `first` of every data shard on."""

        def put(whole: jax.Array, part: jax.Array) -> jax.Array:
            to, of = (x.reshape(self._shards.total, -1, *x.shape[1:]) for x in (whole, part))
            both = jax.lax.dynamic_update_slice_in_dim(to, of, first, axis=1)
            return constrain(both.reshape(whole.shape), "batch", *[None] * (whole.ndim - 1))

        return jax.tree.map(put, whole, part)


def crops_at_a_time(rows: int) -> int:
    """Crops of a part, of so many of a data shard."""
    return min(rows, CROPS_AT_A_TIME)
