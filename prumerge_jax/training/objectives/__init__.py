"""What a run can be trained to do; two are always known, other rooms register theirs."""

from prumerge_jax.training.objectives import any_budget, next_token
from prumerge_jax.training.objectives.registry import register_objective

register_objective("next_token", next_token.make)
register_objective("any_budget", any_budget.make)
