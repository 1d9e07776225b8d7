"""Methods that drop visual tokens inside the decoder, for comparison: their answers, not their
speed."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import jax.numpy as jnp

from prumerge_jax.options import Bounds, check
from prumerge_jax.prumerge import VisualTokens
from prumerge_jax.reductions.base import (
    Assignment,
    Evidence,
    Reduction,
    finite_evidence,
    kept_rows,
)
from prumerge_jax.reductions.drops import Drops
from prumerge_jax.reductions.registry import register, spell

Share = Annotated[float, Bounds(0.001, 1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InDecoder(Reduction):
    """All patches up to the decoder, fewer behind some of its layers."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def selects_patches(self) -> bool:
        """False: the decoder receives all patches."""
        return False

    @property
    def drops_tokens(self) -> bool:
        """True."""
        return True

    def capacity_for(self, num_patches: int) -> int:
        """R: all patches."""
        return num_patches

    def reduce(self, evidence: Evidence) -> VisualTokens:
        """All patches in raster order."""
        batch, num_patches = evidence.hidden.shape[:2]
        patches = jnp.broadcast_to(jnp.arange(num_patches, dtype=jnp.int32), (batch, num_patches))
        kept = jnp.where(finite_evidence(evidence), num_patches, -1).astype(jnp.int32)
        return kept_rows(evidence.hidden, patches, kept)

    def explain(self, evidence: Evidence) -> Assignment:
        """Nothing to show.

        Raises:
          ValueError: always.
        """
        raise ValueError(
            f"the reduction {spell(self)} drops tokens inside the decoder, by what is asked; "
            "no patch is dropped before"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastV(InDecoder):
    """FastV (arXiv 2403.06764): behind a layer, the tokens that the prompt's last token attends to.

    Attributes:
      layer: layers that see all tokens; the last of them ranks.
      keep: share of the visual tokens that is left, 1 - R of the paper.
      of: which tokens are dropped; `text` leaves the image alone and drops from the prompt's text.
    """

    layer: Annotated[int, Bounds(1, 256)] = 2
    keep: Share = 0.5
    of: Literal["visual", "text"] = "visual"

    def drops(self, depth: int) -> Drops:
        """One stage; positions stay what they are."""
        layers = _below(self, (self.layer,), depth)
        return Drops(layers, (self.keep,), ranked_by="previous", of=self.of)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PyramidDrop(InDecoder):
    """PyramidDrop (arXiv 2410.17247): at a quarter, half and three quarters of the layers.

    Attributes:
      keep: share of the tokens of the stage before that each stage leaves.
    """

    keep: Share = 0.5

    def drops(self, depth: int) -> Drops:
        """Three stages."""
        layers = [max(round(depth * stage / 4), 1) for stage in (1, 2, 3)]
        shares = [self.keep**stage for stage in (1, 2, 3)]
        return Drops(*_one_per_layer(layers, shares), renumbered=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseVLM(InDecoder):
    """SparseVLM (arXiv 2410.04417): ranked by the words that belong to the image.

    The layers are those of 2, 6 and 15 of 32 layers. What comes back of the dropped tokens stands
    at the centre of its cluster, not behind the others as in the authors' code.

    Attributes:
      schedule: the authors' counts for so many tokens of 576 in the mean over layers; of other
        numbers of tokens the same shares are left.
    """

    COUNTS: ClassVar[dict[str, tuple[int, int, int]]] = {
        "192": (300, 200, 110),
        "128": (303, 110, 36),
        "64": (66, 30, 17),
    }

    schedule: Literal["192", "128", "64"] = "192"

    def drops(self, depth: int) -> Drops:
        """Three stages."""
        layers = [max(round(depth * layer / 32), 1) for layer in (2, 6, 15)]
        shares = [count / 576 for count in self.COUNTS[self.schedule]]
        stages = _one_per_layer(layers, shares)
        return Drops(*stages, raters="text", renumbered=True, recycled=True)


def _one_per_layer(
    layers: Sequence[int], shares: Sequence[float]
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Layers and shares; of stages that meet in a decoder of few layers the last one counts."""
    stages = dict(zip(layers, shares, strict=True))
    return tuple(stages), tuple(stages.values())


def _below(reduction: Reduction, layers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The layers.

    Raises:
      ValueError: the decoder has fewer.
    """
    if layers[-1] >= depth:
        raise ValueError(
            f"reduction {spell(reduction)}: the decoder has {depth} layers; expected layer from 1 "
            f"to {depth - 1}"
        )
    return layers


register("fastv", FastV)
register("pyramiddrop", PyramidDrop)
register("sparsevlm", SparseVLM)
