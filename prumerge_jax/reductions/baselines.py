"""Baselines: as many tokens as a reduction would give each image, but patches chosen blindly."""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from prumerge_jax import selection
from prumerge_jax.options import Bounds, check
from prumerge_jax.prumerge import VisualTokens
from prumerge_jax.reductions.base import Evidence, Reduction, kept_rows


@dataclasses.dataclass(frozen=True)
class Choice:
    """How patches are ranked, and with which seed; the parameters that every reduction has.

    Attributes:
      ranking: `attention` leaves the reduction as it is. `random` and `uniform` keep as many tokens
        for each image, but patches chosen at random or evenly spaced, and unmerged.
      seed: seed of the ranking `random`.
    """

    ranking: Literal["attention", "random", "uniform"] = "attention"
    seed: Annotated[int, Bounds(0, 2**32 - 1)] = 0

    def __post_init__(self) -> None:
        check(self)
        if self.seed and self.ranking != "random":
            raise ValueError(f"seed is {self.seed}, but nothing is drawn; add ranking=random")

    def apply(self, reduction: Reduction) -> Reduction:
        """The reduction itself, or its baseline.

        Raises:
          ValueError: a baseline of a reduction that keeps every patch.
        """
        if self.ranking == "attention":
            return reduction
        if not reduction.selects_patches:
            raise ValueError(f"ranking is {self.ranking!r}, but every patch is kept")
        return Baseline(reduction, self.ranking, self.seed)


@dataclasses.dataclass(frozen=True)
class Baseline(Reduction):
    """As many tokens as `counted` gives each image, its patches chosen without attention.

    Attributes:
      counted: the reduction whose counts are used.
      ranking: `random`, or `uniform` for evenly spaced patches.
      seed: seed of `random`. The draw depends on the image too, and not on its batch.
    """

    counted: Reduction
    ranking: Literal["random", "uniform"]
    seed: int = 0

    @property
    def needs(self) -> frozenset[str]:
        """What the counted reduction reads."""
        return self.counted.needs

    @property
    def varying(self) -> bool:
        """Whether the counts vary."""
        return self.counted.varying

    @property
    def raster_order(self) -> bool:
        """Whether tokens come in the order of their patches."""
        return self.counted.raster_order

    @property
    def question_tokens(self) -> int:
        """M of the counted reduction."""
        return self.counted.question_tokens

    def capacity_for(self, num_patches: int) -> int:
        """R of the counted reduction."""
        return self.counted.capacity_for(num_patches)

    def uncapped(self) -> "Baseline":
        """The baseline of the uncapped reduction."""
        return dataclasses.replace(self, counted=self.counted.uncapped())

    def image_size(self, image_size: int, patch_size: int) -> int:
        """The counted reduction's."""
        return self.counted.image_size(image_size, patch_size)

    def watch(
        self, score: jax.Array, before: jax.Array, after: jax.Array, depth: jax.Array
    ) -> jax.Array:
        """What the counted reduction watches."""
        return self.counted.watch(score, before, after, depth)

    def reduce(self, evidence: Evidence) -> VisualTokens:
        """Unmerged patches, as many as the counted reduction would give tokens."""
        num_patches = evidence.hidden.shape[1]
        # Of the counted tokens only their number is used; under jit XLA computes nothing else.
        required = self.counted.reduce(evidence).required
        number = jnp.clip(required, 0, num_patches)[:, None]
        rank = self._rank(evidence.attention, number)
        member = rank < number
        slot = selection.count_before(member) if self.raster_order else rank
        capacity = self.capacity_for(num_patches)
        patches = selection.patch_in_slot(selection.in_slot(member, slot, capacity))
        kept = jnp.where(required < 0, required, number[:, 0]).astype(jnp.int32)
        return kept_rows(evidence.hidden, patches, kept)

    def _rank(self, attention: jax.Array, number: jax.Array) -> jax.Array:
        """A rank [B, N] that ignores attention, but for the number of patches it will keep."""
        num_patches = attention.shape[1]
        patch = jnp.arange(num_patches)
        if self.ranking == "uniform":
            member = selection.evenly_spread(patch, number, num_patches)
            before = selection.count_before(member)
            return jnp.where(member, before, number + selection.count_before(~member))

        # Seeded by the image's own integers, so that batch mates play no part.
        def draw(top_patch: jax.Array, number: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.key(self.seed), top_patch * num_patches + number)
            return jax.random.uniform(key, (num_patches,))

        top_patch = jnp.argmax(attention, axis=-1).astype(jnp.int32)
        return selection.descending_rank(jax.vmap(draw)(top_patch, number[:, 0]))
