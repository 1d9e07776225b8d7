"""What one process of several holds, and what all of them must know of each other."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from prumerge_jax.sharding.mesh import logical_spec


def allgather_ints(values: Sequence[int]) -> np.ndarray:
    """One row of integers from each process, int32 [processes, len(values)].

    Every process must call it at the same point of its execution. With a single process it costs
    nothing, with several it waits for the devices.
    """
    own = np.array(values, np.int32)
    if jax.process_count() == 1:
        return own[None]
    return np.asarray(multihost_utils.process_allgather(own))


@dataclasses.dataclass(frozen=True)
class DataShards:
    """The shards of a batch that are placed on the devices of this process.

    Attributes:
      local: their indices, ascending.
      total: number of data shards of the mesh.
      representatives: one process for each share of the shards. Where several processes hold the
        same shards (`tensor` spans processes), it is the first of them.
    """

    local: tuple[int, ...]
    total: int
    representatives: tuple[int, ...]

    @classmethod
    def of(cls, mesh: Mesh) -> "DataShards":
        """The shards of this process.

        Raises:
          ValueError: the mesh leaves out a process, or splits the shards of one in two.
        """
        total = mesh.shape["data"] * mesh.shape["fsdp"]
        held: dict[int, set[int]] = {process: set() for process in range(jax.process_count())}
        indices = NamedSharding(mesh, logical_spec("batch")).devices_indices_map((total,))
        for device in mesh.devices.flat:
            (index,) = indices[device]
            held[device.process_index] |= set(range(*index.indices(total)))
        shares = {process: tuple(sorted(shards)) for process, shards in held.items()}
        first = {share: process for process, share in sorted(shares.items(), reverse=True)}
        if () in first or sum(len(share) for share in first) != total:
            raise ValueError(
                f"mesh {dict(mesh.shape)} gives the processes the data shards {shares}; expected "
                "every process to have some, and two processes the same ones or none in common: "
                "choose sizes that multiply to all devices"
            )
        return cls(shares[jax.process_index()], total, tuple(sorted(first.values())))

    def rows(self, size: int) -> tuple[int, ...]:
        """The rows of a global batch of `size` rows that this process holds."""
        block = size // self.total
        return tuple(
            row for shard in self.local for row in range(shard * block, (shard + 1) * block)
        )


def addressable_rows(array: jax.Array) -> np.ndarray:
    """The rows of an array that this process holds; no other axis may be sharded."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def to_global_array(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """The rows of this process on its devices, as part of the global batch."""
    sharding = NamedSharding(mesh, logical_spec("batch", *[None] * (array.ndim - 1)))
    return jax.make_array_from_process_local_data(sharding, array)
