"""Reductions of visual tokens: PruMerge, its baselines and others, in one spelling.

    reduction = reductions.parse("prumerge:neighbours=8")
    visual = reductions.reduce(reductions.Evidence(hidden, keys, attention), reduction)

A method is a frozen dataclass that derives from `Reduction`, in a separate file that ends in its
`register(...)` and is imported here.
"""

from prumerge_jax.reductions import (  # noqa: F401  # they register themselves
    crops,
    downsample,
    evolution,
    grouping,
    in_decoder,
    in_tower,
    iterative,
    prumerge,
    question,
    set_rules,
)
from prumerge_jax.reductions.apply import (
    ReductionLike,
    as_reduction,
    explain,
    reduce,
    refusal_of_crops,
    require_before_decoder,
)
from prumerge_jax.reductions.base import Assignment, Evidence, Reduction, kept_rows
from prumerge_jax.reductions.baselines import Baseline
from prumerge_jax.reductions.downsample import Downsample
from prumerge_jax.reductions.drops import Drops
from prumerge_jax.reductions.prumerge import PruMerge
from prumerge_jax.reductions.question import keywords
from prumerge_jax.reductions.registry import (
    equal_count_baselines,
    names,
    parameters,
    parse,
    parse_list,
    register,
    spell,
    with_budgets,
    with_parameters,
)
from prumerge_jax.reductions.set_rules import SetRule
from prumerge_jax.reductions.stages import Stage

__all__ = [
    "Assignment", "Baseline", "Downsample", "Drops", "Evidence", "PruMerge", "Reduction",
    "ReductionLike", "as_reduction", "equal_count_baselines", "explain", "kept_rows", "keywords",
    "names", "parameters", "parse", "parse_list", "reduce", "refusal_of_crops", "register",
    "require_before_decoder", "SetRule", "spell", "Stage", "with_budgets", "with_parameters",
]  # fmt: skip
