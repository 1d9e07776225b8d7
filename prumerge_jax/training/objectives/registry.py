"""What differs between objectives: the module, its loss, its samples and micro-batches.

An objective is built from the configuration alone, without a weight or a sample, so that a recipe
can be checked and compiled ahead of time.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.messages import did_you_mean, quoted
from prumerge_jax.models.quantisation import QuantParam
from prumerge_jax.training.batches import GlobalBatch
from prumerge_jax.training.config import ConfigError, TrainConfig
from prumerge_jax.training.inputs import TrainingSource
from prumerge_jax.training.step import Loss
from prumerge_jax.training.weights import AbstractModule, Shapes, Weights

Packer = Callable[[Iterable[list[Any]], int], Iterator[GlobalBatch]]
"""(this process's samples of each global batch, samples used before) -> global batches."""


@dataclasses.dataclass(frozen=True, eq=False)
class Objective:
    """One training objective.

    Attributes:
      module: the module whose weights the loss takes.
      loss: loss of one micro-batch.
      learning_rates: peak rate of every trained weight, by path.
      dtype: what the objective computes in; also the dtype of the frozen weights.
      open_source: finds and checks the samples, without writing anything.
      packer: makes micro-batches of samples, from the frozen weights, the mesh and the number of
        steps of the complete run.
      finish: maps the trained weights to those that the run exports.
    """

    module: AbstractModule[Any]
    loss: Loss
    learning_rates: Mapping[str, float]
    dtype: jnp.dtype
    open_source: Callable[[Tokenizer], TrainingSource]
    packer: Callable[[Tokenizer, Weights, Mesh, int], Packer]
    finish: Callable[[Weights], Weights] = lambda trained: trained

    def shapes(self) -> Shapes:
        """All weights as the run holds them: trained ones float32, frozen ones in `dtype`, those of
        quantised kernels in their own."""
        variables = self.module.variables
        return {
            path: shape
            if path in self.learning_rates or isinstance(variables[path], QuantParam)
            else jax.ShapeDtypeStruct(shape.shape, self.dtype)
            for path, shape in self.module.shapes().items()
        }

    def trained(self) -> Shapes:
        """The weights that train."""
        return {path: shape for path, shape in self.shapes().items() if path in self.learning_rates}

    def frozen(self) -> Shapes:
        """The weights that do not."""
        return {
            path: shape for path, shape in self.shapes().items() if path not in self.learning_rates
        }


_OBJECTIVES: dict[str, Callable[[TrainConfig], Objective]] = {}


def register_objective(name: str, build: Callable[[TrainConfig], Objective]) -> None:
    """Makes an objective known; `build` gets a configuration whose model sizes are known."""
    _OBJECTIVES[name] = build


def make_objective(config: TrainConfig) -> Objective:
    """The objective that `config.objective` names.

    Raises:
      ValueError: there is no such objective, or the configuration contradicts itself.
    """
    if config.objective not in _OBJECTIVES:
        raise ConfigError(
            f"config.objective is {quoted(config.objective)}; expected one of "
            f"{sorted(_OBJECTIVES)}{did_you_mean(config.objective, _OBJECTIVES)}"
        )
    return _OBJECTIVES[config.objective](config)
