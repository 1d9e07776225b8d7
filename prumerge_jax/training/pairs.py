"""Micro-batches in which every sample stands twice: with few visual tokens and with more.

The images are encoded once, in the order in which a set rule chooses their patches. How many a
sample gets is drawn on the host, and its tokens are the first of that order: those of the student
are among those of the teacher.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from prumerge_jax.data import packing
from prumerge_jax.data.pipeline import Example
from prumerge_jax.data.tokens import IGNORE
from prumerge_jax.sharding.processes import addressable_rows, to_global_array
from prumerge_jax.training.batches import (
    BatchPacker,
    Planned,
    RowBatch,
    check_finite,
    empty_rows,
    fit_request,
    token_counts,
)
from prumerge_jax.training.weights import Leaf


class RankedTokens(NamedTuple):
    """All patches of encoded images, and which of them a budget takes.

    Attributes:
      tokens: [B, N, Dv].
      order: [B, K] int32, patches in the order of choice.
      available: [B] int32, patches that may be chosen; -1 where an image is not finite.
    """

    tokens: Leaf
    order: Leaf
    available: Leaf


class PairBatch(NamedTuple):
    """A micro-batch on the device.

    Attributes:
      student: the rows that are learned from.
      teacher: the same samples in the same rows, which are longer; None without a teacher.
      teacher_at: [rows, T] int32, the teacher's column that predicts what the student's column
        does; 0 where there is no target.
    """

    student: RowBatch
    teacher: RowBatch | None = None
    teacher_at: Leaf | None = None


@dataclasses.dataclass(frozen=True)
class Budgets:
    """How many visual tokens a sample gets, as a function of seed and place in the stream.

    Counts are log-uniform between a lower bound, which falls geometrically, and `most`.

    Attributes:
      lower: the lower bound at the first step, and once it has fallen.
      most: the largest count.
      falling: share of the steps over which the lower bound falls.
      samples: of the complete run.
      seed: decides every count.
    """

    lower: tuple[int, int]
    most: int
    falling: float
    samples: int
    seed: int

    def lower_bound(self, place: int) -> float:
        """The lower bound for the sample at a place."""
        progress = min(place / max(self.falling * self.samples, 1), 1.0)
        first, last = np.log(self.lower)
        return float(np.exp(first + progress * (last - first)))

    def draw(self, place: int) -> int:
        """The number of visual tokens of the sample at a place."""
        lowest = self.lower_bound(place)
        uniform = np.random.default_rng([self.seed, place]).random()
        count = np.floor(lowest * (self.most / lowest) ** uniform + 0.5)
        return int(np.clip(count, min(self.lower), self.most))


@dataclasses.dataclass(frozen=True)
class TeacherShape:
    """What the teacher sees.

    Attributes:
      factor: its visual tokens per one of the student's; None gives it all patches.
      length: tokens per row.
    """

    factor: float | None
    length: int

    def most(self, students: int, num_patches: int) -> int:
        """The largest number of visual tokens, where the student has at most so many."""
        if self.factor is None:
            return num_patches
        return min(num_patches, math.ceil(self.factor * students))

    def counts(self, students: np.ndarray, available: np.ndarray, num_patches: int) -> np.ndarray:
        """Visual tokens of every image, [B] like the student's and the patches to choose from."""
        if self.factor is None:
            return np.full_like(students, num_patches)
        wanted = np.ceil(self.factor * students).astype(students.dtype)
        return np.where(wanted >= num_patches, num_patches, np.clip(wanted, 0, available))


class PairPacker(BatchPacker):
    """Draws counts, packs and places; `encode` gives `RankedTokens`.

    Args:
      budgets: the counts of the student.
      teacher: None packs the student alone.
      **others: as in `BatchPacker`.
    """

    def __init__(
        self, encode: Any, *, budgets: Budgets, teacher: TeacherShape | None, **others: Any
    ) -> None:
        super().__init__(encode, **others)
        self._budgets = budgets
        self._teacher = teacher

    def _plan(self, examples: Sequence[Example], encoded: Any, places: np.ndarray) -> Planned:
        order, available = self._ranking(examples, encoded)
        counts = np.array([self._budgets.draw(int(place)) for place in places])
        student = first_patches(order, np.clip(counts, 0, available), self._num_patches)
        layouts, lengths = [student], [self._shape.length]
        if self._teacher is not None:
            more = self._teacher.counts(counts, available, self._num_patches)
            layouts.append(first_patches(order, more, self._num_patches))
            lengths.append(self._teacher.length)
        requests = [
            _shortest(example, row, layouts, lengths) for row, example in enumerate(examples)
        ]
        windows = self._pack(requests, layouts, lengths)
        tokens = token_counts(examples, student, [rows[0] for rows in windows])
        if self._teacher is not None:
            taught = token_counts(examples, layouts[1], [rows[1] for rows in windows])
            tokens["teacher_tokens"] = taught["tokens"]
        kept = np.array([request.token_ids.size for request in requests])
        return Planned(windows, encoded.tokens, kept, tokens)

    def _pack(
        self,
        requests: Sequence[packing.Request],
        layouts: Sequence[packing.VisualLayout],
        lengths: Sequence[int],
    ) -> list[tuple[packing.Rows, ...]]:
        shards, position_ids = len(self._shards.local), self._shape.position_ids
        packed = packing.pack_together(
            requests, layouts, lengths, self._local_rows(), shards=shards, position_ids=position_ids
        )
        return [
            tuple(_by_patch(rows, layout) for rows, layout in zip(window, layouts, strict=True))
            for window in packed
        ]

    def _ranking(
        self, examples: Sequence[Example], encoded: RankedTokens
    ) -> tuple[np.ndarray, np.ndarray]:
        """Order [b, K] and number [b] of the patches of this process's images."""
        available = addressable_rows(encoded.available)
        for example, number in zip(examples, available, strict=True):
            if example.has_image:
                check_finite(example, int(number))
        return addressable_rows(encoded.order), available

    def _empty(self, window: Any) -> Any:
        return tuple(empty_rows(rows) for rows in window)

    def _place(self, window: Any, visual_tokens: Any, image_rows: np.ndarray) -> Any:
        student, *teacher = (self._place_rows(rows, visual_tokens, image_rows) for rows in window)
        if not teacher:
            return PairBatch(student)
        at = to_global_array(teacher_columns(*(rows.targets for rows in window)), self._mesh)
        return PairBatch(student, teacher[0], at)


def first_patches(
    order: np.ndarray, counts: Sequence[int] | np.ndarray, num_patches: int
) -> packing.VisualLayout:
    """The first patches of every image's order, in raster order.

    Args:
      order: [B, K] int32.
      counts: [B], patches per image, at most K; or `num_patches`, which takes them all.
      num_patches: N.
    """
    patches = np.full((len(order), num_patches), -1, np.int32)
    for row, count in enumerate(counts):
        chosen = np.arange(num_patches) if count == num_patches else order[row, :count]
        patches[row, : len(chosen)] = np.sort(chosen)
    return packing.VisualLayout(np.asarray(counts, np.int32), patches, num_patches)


def teacher_columns(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """For every target of the student's rows the teacher's column with the same one.

    Args:
      student, teacher: targets [rows, T] and [rows, T'] of the same samples in the same rows.

    Returns:
      int32 [rows, T], 0 where there is no target.
    """
    columns = np.zeros(student.shape, np.int32)
    columns[student != IGNORE] = np.nonzero(teacher != IGNORE)[1]
    return columns


def _by_patch(rows: packing.Rows, layout: packing.VisualLayout) -> packing.Rows:
    """The same rows, whose `visual_index` is b * N + the patch instead of b * N + its slot."""
    image, slot = np.divmod(rows.visual_index, layout.num_patches)
    patch = image * layout.num_patches + layout.patch_indices[image, slot]
    index = np.where(rows.visual_index < 0, -1, patch).astype(np.int32)
    return dataclasses.replace(rows, visual_index=index)


def _shortest(
    example: Example,
    row: int,
    layouts: Sequence[packing.VisualLayout],
    lengths: Sequence[int],
) -> packing.Request:
    """As much of a sample as fits into the rows with all layouts."""
    fitting = [
        fit_request(example, row, int(layout.lengths[row]), length)
        for layout, length in zip(layouts, lengths, strict=True)
    ]
    return min(fitting, key=lambda request: request.token_ids.size)
