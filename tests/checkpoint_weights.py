"""Modules with the weights of a checkpoint."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

from prumerge_jax.conversion import keys

_Module = TypeVar("_Module", bound=nnx.Module)


def filled(
    module: _Module,
    weights: Iterable[keys.Weight],
    tensors: Mapping[str, np.ndarray],
    root: str = "",
) -> _Module:
    """The module with the tensors of these canonical keys; `root` is its path in a LlavaModel."""
    graphdef, state = nnx.split(module)
    flat = dict(nnx.to_flat_state(state))
    for weight in weights:
        array = np.empty(weight.shape, np.float32)
        parts = [array] if weight.num_layers is None else array
        for key, part in zip(weight.keys, parts, strict=True):
            weight.transform.checkpoint_view(part)[...] = tensors[key]
        path = tuple(weight.path.removeprefix(root).split("."))
        flat[path] = flat[path].replace(jnp.asarray(array))
    return nnx.merge(graphdef, nnx.from_flat_state(flat))
