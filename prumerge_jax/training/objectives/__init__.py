"""What a run can be trained to do; `next_token` is always known, other rooms register theirs."""

from prumerge_jax.training.objectives import next_token
from prumerge_jax.training.objectives.registry import register_objective

register_objective("next_token", next_token.make)
