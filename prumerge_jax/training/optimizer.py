"""AdamW with a learning rate per parameter group under one warm-up and cosine shape.

Only trained weights are ever passed in, so the optimizer holds no state for frozen ones. Moments
are float32, like the weights they belong to.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

# What is not decayed, as in Hugging Face's Trainer: biases and the scales of norms.
_NOT_DECAYED = ("bias", "scale")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The settings that all parameter groups share. The defaults are LLaVA-1.5's.

    Attributes:
      warmup_ratio: share of all steps in which the rate rises linearly from 0, rounded up to
        full steps; afterwards it falls to 0 along a cosine.
      weight_decay: decoupled; biases and norm scales are not decayed.
      b1, b2, eps: Adam's.
      clip_norm: largest global norm of the gradient; None does not clip.
    """

    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio is {self.warmup_ratio}; expected 0 <= ratio < 1")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"clip_norm is {self.clip_norm}; expected a positive norm or None")


def make_optimizer(
    config: OptimizerConfig, total_steps: int, learning_rates: Mapping[str, float]
) -> optax.GradientTransformation:
    """AdamW over a flat dictionary of weights.

    Args:
      config: shared settings.
      total_steps: optimizer steps of the complete run, which shape the schedule.
      learning_rates: the peak rate of every trained weight, by dotted path.
    """
    decayed = {path: path.rsplit(".", 1)[-1] not in _NOT_DECAYED for path in learning_rates}
    clip = [] if config.clip_norm is None else [optax.clip_by_global_norm(config.clip_norm)]
    return optax.chain(
        *clip,
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=jnp.float32),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_schedule(schedule(config, total_steps)),
        _scale_each(learning_rates),
    )


def schedule(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """The factor of the peak learning rate at a step counted from 0.

    As transformers' `get_cosine_schedule_with_warmup`: the first step of a warm-up has rate 0.
    """
    warmup_steps = math.ceil(config.warmup_ratio * total_steps)

    def factor(step: jax.Array | int) -> jax.Array:
        rising = step / max(warmup_steps, 1)
        progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        falling = (1 + jnp.cos(jnp.pi * jnp.minimum(progress, 1))) / 2
        return jnp.where(step < warmup_steps, rising, falling)

    return factor


def _scale_each(learning_rates: Mapping[str, float]) -> optax.GradientTransformation:
    def update(updates: dict[str, jax.Array], params: object = None) -> dict[str, jax.Array]:
        return {path: -learning_rates[path] * update for path, update in updates.items()}

    return optax.stateless(update)
