"""Reductions as callers name them, applied to evidence."""

from prumerge_jax.messages import quoted
from prumerge_jax.prumerge import PruMergeConfig, VisualTokens
from prumerge_jax.reductions.base import Assignment, Evidence, Reduction
from prumerge_jax.reductions.prumerge import PruMerge
from prumerge_jax.reductions.registry import parse, spell

ReductionLike = str | Reduction | PruMergeConfig
"""A reduction by its spelling, as itself, or as PruMerge's parameters alone."""


def as_reduction(reduction: ReductionLike) -> Reduction:
    """The reduction that is meant.

    Raises:
      ValueError: a spelling that is not valid, or an object of another type.
    """
    if isinstance(reduction, PruMergeConfig) and not isinstance(reduction, PruMerge):
        return PruMerge(**vars(reduction))
    if isinstance(reduction, Reduction):
        return reduction
    if isinstance(reduction, str):
        return parse(reduction)
    raise ValueError(f"reduction is {quoted(reduction)}; expected text such as 'prumerge'")


def reduce(evidence: Evidence, reduction: ReductionLike) -> VisualTokens:
    """The visual tokens of every image; under `jax.jit` the reduction is static.

    Raises:
      ValueError: the reduction is not valid, or needs evidence that is not there.
    """
    return _supplied(evidence, reduction).reduce(evidence)


def explain(evidence: Evidence, reduction: ReductionLike) -> Assignment:
    """What becomes of every patch; under `jax.jit` the reduction is static.

    Raises:
      ValueError: as `reduce`.
    """
    return _supplied(evidence, reduction).explain(evidence)


def require_before_decoder(reduction: Reduction, where: str) -> None:
    """Refuses a reduction that drops tokens inside the decoder.

    Args:
      reduction: what was asked for.
      where: what cannot do that, as `training`.

    Raises:
      ValueError: it is one.
    """
    if reduction.drops_tokens:
        raise ValueError(
            f"the reduction {spell(reduction)} drops tokens inside the decoder, which is emulated "
            f"for comparisons and saves nothing; {where} expects one that reduces before it"
        )


def refusal_of_crops(reduction: Reduction) -> str | None:
    """Why a reduction cannot take an image of several crops; None if it can."""
    if reduction.takes_several_crops:
        return None
    return (
        f"the reduction {spell(reduction)} shares a fixed number of unmerged tokens out over the "
        "crops of an image; expected it without 'adaptive' and 'merge', or one that reduces each "
        "crop alone, as 'top'"
    )


def _supplied(evidence: Evidence, reduction: ReductionLike) -> Reduction:
    reduction = as_reduction(reduction)
    missing = sorted(name for name in reduction.needs if getattr(evidence, name) is None)
    if missing:
        raise ValueError(
            f"reduction {quoted(spell(reduction))} needs evidence that was not gathered: "
            f"{', '.join(missing)}"
        )
    return reduction
