"""Attention on a mesh: every device computes its own rows and heads, without communication."""

from collections.abc import Callable, Sequence

import jax
from jax.sharding import PartitionSpec

from prumerge_jax import sharding
from prumerge_jax.sharding.mesh import Axes

HEADS: Axes = ("batch", None, "heads", None)
"""Logical axes of queries, keys and values [B, T, H, D] in the decoder."""


def on_shards(
    run: Callable[..., jax.Array],
    arrays: Sequence[jax.Array | None],
    axes: Sequence[Axes],
    *,
    check_vma: bool = True,
) -> jax.Array:
    """`run(*arrays)`, on a mesh by every device on its own rows and heads.

    Args:
      run: takes queries, keys and more, returns what is split as its queries are.
      arrays: the arguments, global.
      axes: logical axes of each argument.
      check_vma: whether `run` declares its varying axes.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        # The split of the keys: query heads divide where theirs do.
        keys = arrays[1]
        assert keys is not None
        entries = dict(zip(axes[1], sharding.divisible_spec(keys.shape, *axes[1]), strict=True))
        specs = tuple(PartitionSpec(*(entries[axis] for axis in names)) for names in axes)
        run = jax.shard_map(run, in_specs=specs, out_specs=specs[0], check_vma=check_vma)
    return run(*arrays)
