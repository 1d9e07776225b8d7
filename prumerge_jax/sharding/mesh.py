"""The device mesh and the one table that says which array axis is sharded over which mesh axis.

Weights and activations name their axes logically (`embed`, `heads`, ...); `RULES` maps those names
to the mesh axes `data`, `fsdp` and `tensor`. Changing how the model is laid out means changing
this table and nothing else.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
Axes = tuple[str | None, ...]
"""Logical names of an array's axes, keys of `RULES`; None is an axis that is not sharded."""

# logical axis -> mesh axis (or axes). `None` in an annotation means "not sharded".
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),  # rows, slots, visual tokens
    # Images in the tower. The tower is small: it is replicated but for `embed`, and every device
    # takes its share of the images; splitting each layer would cost two all-reduces per layer.
    "images": ("data", "fsdp", "tensor"),
    "embed": "fsdp",  # the model width D of a weight
    "heads": "tensor",  # attention heads, side by side
    "mlp": "tensor",  # the inner width of an MLP
    "vocab": "tensor",  # vocabulary rows of the embedding and columns of the head
    # The wide axis of an adapter's factor, named after the kernel's axis. The other axis is the
    # rank, which is not sharded, so the wide one takes both mesh axes: with their gradients and
    # moments, replicated adapters would take more of a small chip than the sharded model.
    "adapter_embed": ("fsdp", "tensor"),
    "adapter_heads": ("tensor", "fsdp"),
    "adapter_mlp": ("tensor", "fsdp"),
}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of `data * fsdp * tensor` devices, the first ones of this job.

    Raises:
      ValueError: fewer devices than the mesh needs.
    """
    return mesh_on(jax.devices(), data, fsdp, tensor)


def mesh_on(
    devices: Sequence[jax.Device], /, data: int = 1, fsdp: int = 1, tensor: int = 1
) -> Mesh:
    """`make_mesh` on the first of these devices.

    Axis types are Auto: under Explicit a lookup in an `fsdp`-sharded embedding is an error.

    Raises:
      ValueError: fewer devices than the mesh needs, or slices that it cannot be laid over.
    """
    needed = data * fsdp * tensor
    if needed > len(devices):
        raise ValueError(
            f"a mesh of data={data} fsdp={fsdp} tensor={tensor} needs {needed} devices; "
            f"there are {len(devices)}"
        )
    arranged = arrange(devices[:needed], (data, fsdp, tensor))
    return Mesh(arranged, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def arrange(devices: Sequence[jax.Device], sizes: tuple[int, int, int]) -> np.ndarray:
    """Devices in the shape of a mesh, those with fast links between them side by side.

    `jax.make_mesh` splits no axis of a TPU's torus except v5e's, and takes one slice only (of TPUs,
    or the GPUs of one node). Here several slices are placed along `data`, and along
    `fsdp` where `data` is too short.

    Raises:
      ValueError: the slices are not equal, or their number does not divide `data` times `fsdp`.
    """
    slices = Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    data, fsdp, tensor = sizes
    if data * fsdp % len(slices) or len(set(slices.values())) > 1:
        raise ValueError(
            f"a mesh of data={data} fsdp={fsdp} tensor={tensor} cannot be laid over slices (or "
            f"nodes) of {sorted(slices.values())} devices; expected equal ones, whose number "
            "divides data times fsdp"
        )
    of_data = math.gcd(data, len(slices))
    of_fsdp = len(slices) // of_data
    return mesh_utils.create_hybrid_device_mesh(
        (data // of_data, fsdp // of_fsdp, tensor),
        (of_data, of_fsdp, 1),
        devices,
        allow_split_physical_axes=True,
    )


def logical_spec(*logical: str | None) -> PartitionSpec:
    """The partition spec of an array whose axes carry these logical names.

    Raises:
      KeyError: a name that `RULES` does not know.
    """
    return PartitionSpec(*(None if name is None else RULES[name] for name in logical))


def divisible_spec(shape: Sequence[int], *logical: str | None) -> PartitionSpec:
    """`logical_spec` on the current mesh, with as many mesh axes as divide an axis's length."""
    sizes = jax.sharding.get_abstract_mesh().shape
    entries = []
    for length, entry in zip(shape, logical_spec(*logical), strict=True):
        axes = (entry,) if isinstance(entry, str) else entry or ()
        while length % math.prod(sizes[axis] for axis in axes):
            axes = axes[:-1]
        entries.append(axes or None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Constrains an activation's sharding; without a mesh, returns it unchanged.

    An axis that a mesh axis does not divide is left off it: XLA would pad the uneven shards, and
    move what they hold between devices at every operation that reads the axis another way.

    Auto axis types resolve conflicting claims on a mesh axis silently, by replicating: after an
    embedding lookup both the batch and the table's width claim `fsdp`, and the batch loses. One
    constraint after the lookup restores it.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, divisible_spec(x.shape, *logical))


def unshard_embed(weight: jax.Array, *logical: str | None) -> jax.Array:
    """Constrains a weight to the layout of a product with activations: `embed` axis unsharded.

    Left to itself, XLA makes a loop out of a product with the shards where these are few, and on a
    slice of eight TPU chips the pieces cost more than they hide.
    """
    return constrain(weight, *(None if name == "embed" else name for name in logical))


@contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Makes `mesh` the current mesh, under which `constrain` and logical weight axes take effect.

    None changes nothing: everything is kept on one device.
    """
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh), nnx.logical_axis_rules(list(RULES.items())):
        yield


def platform() -> str:
    """Platform of the current mesh (whose devices may be AOT-only), else the default backend's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def weight_shardings(abstract: nnx.State, mesh: Mesh) -> nnx.State:
    """The declared `NamedSharding` of every variable of an `nnx.eval_shape` state."""
    with use_mesh(mesh):
        return nnx.get_named_sharding(abstract, mesh)


def without_axis(sharding: NamedSharding, axis: str) -> NamedSharding:
    """The sharding that is replicated along one axis of its mesh, and elsewhere the same."""

    def rest(entry: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
        axes = (entry,) if isinstance(entry, str) else entry or ()
        return tuple(each for each in axes if each != axis) or None

    return NamedSharding(sharding.mesh, PartitionSpec(*map(rest, sharding.spec)))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that is replicated on every device."""
    return NamedSharding(mesh, PartitionSpec())


def bytes_per_device(tree: object) -> int:
    """What the arrays of a tree of shapes with shardings take on one device, without padding."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        shard = leaf.sharding.shard_shape(leaf.shape)
        is_integer = jnp.issubdtype(leaf.dtype, jnp.integer)  # some have 4 bits
        bits = jnp.iinfo(leaf.dtype).bits if is_integer else 8 * leaf.dtype.itemsize
        total += math.prod(shard) * bits // 8
    return total


def placed(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """The shapes and dtypes of a tree, each with this sharding."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )
