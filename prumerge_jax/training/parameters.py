"""Weights as one flat dictionary, and which of them train.

Between the compiled functions a model is a dictionary from dotted path to array (`Weights`), the
form in which model directories and checkpoints hold it too. Inside a compiled function a
`Template` turns the dictionary back into the module.
"""

import dataclasses
import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Generic, TypeVar

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from prumerge_jax.sharding.mesh import use_mesh

Weights = dict[str, jax.Array]
Shapes = dict[str, jax.ShapeDtypeStruct]
LearningRates = Sequence[tuple[str, float]]
Leaf = Any
"""An array, or what stands in its place in a tree of the same form: its shape, its sharding."""

Module = TypeVar("Module", bound=nnx.Module)


@dataclasses.dataclass(frozen=True, eq=False)
class Template(Generic[Module]):
    """A module without its arrays.

    Attributes:
      make: builds the module with random weights from a seed.
      graphdef: its structure.
      variables: its abstract variables (shape, dtype, logical axes) by dotted path.
    """

    make: Callable[[int], Module]
    graphdef: nnx.GraphDef
    variables: Mapping[str, nnx.Variable]

    @classmethod
    def of(cls, make: Callable[[int], Module]) -> "Template[Module]":
        """The template of the modules that `make` builds; allocates nothing."""
        with nnx.use_eager_sharding(False):
            graphdef, abstract = nnx.split(nnx.eval_shape(lambda: make(0)))
        return cls(make, graphdef, _flatten(abstract))

    def merge(self, weights: Mapping[str, jax.Array]) -> Module:
        """The module with these weights.

        Raises:
          KeyError: a weight is missing.
        """
        variables = {path: self.variables[path].replace(weights[path]) for path in self.variables}
        return nnx.merge(self.graphdef, _unflatten(variables))

    def shapes(self) -> Shapes:
        """Shape and dtype of every weight, float32 as created."""
        return {
            path: jax.ShapeDtypeStruct(variable.shape, variable.dtype)
            for path, variable in self.variables.items()
        }

    def shardings(self, mesh: Mesh) -> dict[str, NamedSharding]:
        """The declared sharding of every weight."""
        with use_mesh(mesh):
            placed = _flatten(nnx.get_named_sharding(_unflatten(self.variables), mesh))
        return {path: variable.get_value() for path, variable in placed.items()}

    def random(self, seed: int, shapes: Shapes, shardings: Mapping[str, NamedSharding]) -> Weights:
        """Fresh weights for the paths of `shapes`, created in their shards; others cost nothing."""

        def create() -> Weights:
            # Drawn in float32: other dtypes would draw other numbers.
            with nnx.use_eager_sharding(False):
                weights = _flatten(nnx.split(self.make(seed))[1])
            return {path: weights[path][...].astype(shapes[path].dtype) for path in shapes}

        return jax.jit(create, out_shardings={path: shardings[path] for path in shapes})()


def trained_paths(paths: Collection[str], learning_rates: LearningRates) -> dict[str, float]:
    """The weights that train, each with its learning rate; what is not named is frozen.

    Args:
      paths: dotted paths of all weights.
      learning_rates: pairs of a path pattern (`*` stands for anything, dots included) and a rate.

    Raises:
      ValueError: a pattern fits no weight, or two patterns fit the same one.
    """
    rates: dict[str, float] = {}
    pattern_of: dict[str, str] = {}
    for pattern, rate in learning_rates:
        fitting = fnmatch.filter(sorted(paths), pattern)
        if not fitting:
            raise ValueError(
                f"learning_rates: pattern {pattern!r} fits no weight; the weights are "
                f"{', '.join(sorted({path.split('.')[0] + '.…' for path in paths}))}"
            )
        for path in fitting:
            if path in rates:
                raise ValueError(
                    f"learning_rates: {path} fits both {pattern_of[path]!r} and {pattern!r}; "
                    "expected one learning rate per weight"
                )
            rates[path], pattern_of[path] = rate, pattern
    return rates


def _flatten(state: nnx.State) -> dict[str, nnx.Variable]:
    return {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(state)}


def _unflatten(variables: Mapping[str, nnx.Variable]) -> nnx.State:
    flat: Mapping[Any, Any] = {tuple(path.split(".")): v for path, v in variables.items()}
    return nnx.from_flat_state(flat)
