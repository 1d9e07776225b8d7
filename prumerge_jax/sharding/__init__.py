"""The device mesh, the logical axis rules, and runs of several processes."""

from prumerge_jax.sharding.mesh import (
    MESH_AXES,
    RULES,
    arrange,
    constrain,
    divisible_spec,
    logical_spec,
    make_mesh,
    mesh_on,
    platform,
    replicated,
    unshard_embed,
    use_mesh,
    weight_shardings,
)

__all__ = [
    "MESH_AXES",
    "RULES",
    "arrange",
    "divisible_spec",
    "unshard_embed",
    "make_mesh",
    "mesh_on",
    "constrain",
    "platform",
    "replicated",
    "logical_spec",
    "use_mesh",
    "weight_shardings",
]
