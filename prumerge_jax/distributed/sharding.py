"""The device mesh and the one table that says which array axis lies on which mesh axis.

Weights and activations name their axes logically (`embed`, `heads`, ...); `RULES` maps those names
to the mesh axes `data`, `fsdp` and `tensor`. Changing how the model is laid out means changing
this table and nothing else.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")

# logical axis -> mesh axis (or axes). `None` in an annotation means "not sharded".
RULES: dict[str, str | tuple[str, ...]] = {
    "batch": ("data", "fsdp"),  # rows, slots, visual tokens
    # Images in the tower. It is small: every device has it whole but for `embed`, and images of its
    # own, where a part of each layer would cost two all-reduces per layer.
    "images": ("data", "fsdp", "tensor"),
    "embed": "fsdp",  # the model width D of a weight
    "heads": "tensor",  # attention heads, side by side
    "mlp": "tensor",  # the inner width of an MLP
    "vocab": "tensor",  # vocabulary rows of the embedding and columns of the head
    # The wide axis of an adapter's factor, beside the kernel's axis of that name. Its other axis
    # is the rank, which lies on no mesh axis, so the wide one takes both: with their gradients and
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

    Axis types are Auto: `jax.make_mesh` would default to Explicit, under which a lookup in an
    `fsdp`-sharded embedding is an error.

    Raises:
      ValueError: fewer devices than the mesh needs.
    """
    needed = data * fsdp * tensor
    if needed > len(devices):
        raise ValueError(
            f"a mesh of data={data} fsdp={fsdp} tensor={tensor} needs {needed} devices; "
            f"there are {len(devices)}"
        )
    return jax.make_mesh(
        (data, fsdp, tensor),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices[:needed],
    )


def spec(*logical: str | None) -> PartitionSpec:
    """The partition spec of an array whose axes carry these logical names.

    Raises:
      KeyError: a name that `RULES` does not know.
    """
    return PartitionSpec(*(None if name is None else RULES[name] for name in logical))


def even_spec(shape: Sequence[int], *logical: str | None) -> PartitionSpec:
    """`spec` on the current mesh, with as many of an axis' mesh axes as divide its length.

    `jax.shard_map` takes even shards only, where `jax.jit` pads uneven ones.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    entries = []
    for length, entry in zip(shape, spec(*logical), strict=True):
        axes = (entry,) if isinstance(entry, str) else entry or ()
        while length % math.prod(sizes[axis] for axis in axes):
            axes = axes[:-1]
        entries.append(axes or None)
    return PartitionSpec(*entries)


def pin(x: jax.Array, *logical: str | None) -> jax.Array:
    """Constrains an activation's sharding; without a mesh, returns it unchanged.

    Auto axis types resolve conflicting claims on a mesh axis silently, by replicating: after an
    embedding lookup both the batch and the table's width claim `fsdp`, and the batch loses. One
    constraint after the lookup restores it.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(*logical))


def gathered(weight: jax.Array, *logical: str | None) -> jax.Array:
    """Pins a weight the way a product with activations takes it: with its `embed` axis whole.

    Left to itself, XLA makes a loop out of a product with the shards where these are few, and on a
    slice of eight TPU chips the pieces cost more than they hide.
    """
    return pin(weight, *(None if name == "embed" else name for name in logical))


@contextmanager
def use_mesh(mesh: Mesh | None) -> Iterator[None]:
    """Makes `mesh` the current mesh, under which `pin` and logical weight axes take effect.

    None changes nothing: everything stays on one device.
    """
    if mesh is None:
        yield
        return
    with jax.set_mesh(mesh), nnx.logical_axis_rules(list(RULES.items())):
        yield


def platform() -> str:
    """Of the current mesh, whose devices may only be compiled for; without one, the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def weight_shardings(abstract: nnx.State, mesh: Mesh) -> nnx.State:
    """The declared `NamedSharding` of every variable of an `nnx.eval_shape` state."""
    with use_mesh(mesh):
        return nnx.get_named_sharding(abstract, mesh)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
