"""One optimizer step over any number of micro-batches.

Every loss returns a sum and the number of things summed. Gradients of sums add up, and one division
at the end gives the gradient of the mean over the global batch, however its targets are spread over
micro-batches, rows and devices.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from prumerge_jax.sharding.mesh import replicated
from prumerge_jax.training.weights import Leaf, Shapes, Weights

Loss = Callable[[Weights, Any, jax.Array], tuple[jax.Array, jax.Array]]
"""(all weights, micro-batch, dropout key) -> (sum of the loss, number of targets), float32."""


class TrainState(NamedTuple):
    """What a step changes: the trained weights, float32, and the optimizer's state."""

    trained: dict[str, Leaf]
    optimizer: optax.OptState


class Sums(NamedTuple):
    """Totals over the micro-batches of a step."""

    gradient: dict[str, Leaf]
    loss: Leaf
    targets: Leaf


class StepMetrics(NamedTuple):
    """Scalars on the device: mean loss, global gradient norm before clipping, targets."""

    loss: Leaf
    gradient_norm: Leaf
    targets: Leaf


class TrainStep:
    """The jitted functions of a step.

    Args:
      loss: loss of one micro-batch; differentiated in the trained weights alone.
      optimizer: takes the gradient of the mean loss.
      seed: seed of dropout; step and micro-batch are folded in, so that a resumed run draws the
        same.
      shardings: declared shardings of the state (`state_shardings`).
      compiler_options: options of XLA for micro-batches.
    """

    def __init__(
        self,
        loss: Loss,
        optimizer: optax.GradientTransformation,
        *,
        seed: int,
        shardings: TrainState,
        compiler_options: dict[str, Any] | None = None,
    ) -> None:
        self._loss = loss
        self._optimizer = optimizer
        self._seed = seed
        self._shardings = shardings
        mesh = next(iter(shardings.trained.values())).mesh
        everywhere = replicated(mesh)
        self._replicated = everywhere
        self._sums = sums = Sums(shardings.trained, everywhere, everywhere)
        self.init = jax.jit(self._init, out_shardings=shardings)
        self.zeros = jax.jit(self._zeros, out_shardings=sums)
        self.accumulate = jax.jit(
            self._accumulate,
            donate_argnums=(0,),
            out_shardings=sums,
            compiler_options=compiler_options,
        )
        self.update = jax.jit(
            self._update,
            donate_argnums=(0,),
            out_shardings=(shardings, StepMetrics(everywhere, everywhere, everywhere)),
        )

    def abstract_state(self, trained: Shapes) -> TrainState:
        """Shapes, dtypes and shardings of the state: the target of a restore."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(self._init, dict(trained)),
            self._shardings,
        )

    def lower(self, trained: Shapes, frozen: Shapes, batch: Any) -> dict[str, jax.stages.Lowered]:
        """`accumulate` and `update` for abstract arguments, to be compiled ahead of time.

        Args:
          trained, frozen: shapes of the weights; those of `frozen` with shardings.
          batch: a micro-batch of shapes with shardings.
        """
        state = self.abstract_state(trained)
        sums = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(self._zeros, dict(trained)),
            self._sums,
        )
        when = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=self._replicated)
        return {
            "accumulate": self.accumulate.lower(sums, state.trained, frozen, batch, when),
            "update": self.update.lower(state, sums),
        }

    def __call__(
        self, state: TrainState, frozen: Weights, batches: Sequence[Any], step: int
    ) -> tuple[TrainState, StepMetrics]:
        """Runs one step; returns as soon as it is dispatched.

        Args:
          state: donated.
          frozen: the other weights; never donated, never changed.
          batches: the micro-batches of the global batch.
          step: counted from 0.
        """
        sums = self.zeros(state.trained)
        for index, batch in enumerate(batches):
            when = np.array([step, index], np.int32)
            sums = self.accumulate(sums, state.trained, frozen, batch, when)
        return self.update(state, sums)

    def _init(self, trained: Weights) -> TrainState:
        return TrainState(trained, self._optimizer.init(trained))

    def _zeros(self, trained: Weights) -> Sums:
        return Sums(jax.tree.map(jnp.zeros_like, trained), jnp.zeros(()), jnp.zeros(()))

    def _accumulate(
        self, sums: Sums, trained: Weights, frozen: Weights, batch: Any, when: jax.Array
    ) -> Sums:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self._seed), when[0]), when[1])

        def loss(trained: Weights) -> tuple[jax.Array, jax.Array]:
            return self._loss({**frozen, **trained}, batch, key)

        (value, targets), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        return jax.tree.map(jnp.add, sums, Sums(gradient, value, targets))

    def _update(self, state: TrainState, sums: Sums) -> tuple[TrainState, StepMetrics]:
        # A batch without any target has a gradient of zero, not of 0 / 0.
        targets = jnp.maximum(sums.targets, 1)
        gradient = jax.tree.map(lambda g: g / targets, sums.gradient)
        updates, optimizer = self._optimizer.update(gradient, state.optimizer, state.trained)
        metrics = StepMetrics(sums.loss / targets, optax.tree.norm(gradient), sums.targets)
        return TrainState(optax.apply_updates(state.trained, updates), optimizer), metrics


def state_shardings(
    optimizer: optax.GradientTransformation,
    trained: Mapping[str, jax.ShapeDtypeStruct],
    shardings: Mapping[str, NamedSharding],
    mesh: Mesh,
) -> TrainState:
    """Shardings of a `TrainState`: moments as their weights, counters replicated."""
    own = {path: shardings[path] for path in trained}
    abstract = jax.eval_shape(optimizer.init, dict(trained))
    of_optimizer = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        abstract,
        own,
        transform_non_params=lambda _: replicated(mesh),
    )
    return TrainState(own, of_optimizer)
