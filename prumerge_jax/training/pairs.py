"""Micro-batches in which every sample stands twice: with few visual tokens and with more.

The images are encoded once, in the order in which a set rule chooses their patches. How many a
sample gets is drawn on the host, and its tokens are the first of that order: those of the student
are among those of the teacher. A rule that merges averages the others into them, which makes other
tokens for every count.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from prumerge_jax.data import packing
from prumerge_jax.data.pipeline import Example
from prumerge_jax.data.runs import Run
from prumerge_jax.data.tokens import IGNORE
from prumerge_jax.sharding.processes import addressable_rows, to_global_array
from prumerge_jax.training.batches import (
    BatchPacker,
    Planned,
    RowBatch,
    check_finite,
    cut_request,
    empty_rows,
)
from prumerge_jax.training.sample_sizes import kept_tokens
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


Merge = Callable[[RankedTokens, tuple[jax.Array, ...]], jax.Array]
"""What makes merged tokens of ranked ones, see `PairPacker`."""


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
      merge: (ranked, (counts [B] of each version, ...)) -> [B, versions * K, Dv], K slots for each
        version of an image, its tokens first; None shows patches as they are.
      **others: as in `BatchPacker`.
    """

    def __init__(
        self,
        encode: Any,
        *,
        budgets: Budgets,
        teacher: TeacherShape | None,
        merge: Merge | None = None,
        **others: Any,
    ) -> None:
        super().__init__(encode, **others)
        self._budgets = budgets
        self._teacher = teacher
        self._merge = merge

    def _plan(self, examples: Sequence[Example], encoded: Any, places: np.ndarray) -> Planned:
        order, available = self._ranking(examples, encoded)
        drawn = np.array([self._budgets.draw(int(place)) for place in places])
        counts, lengths = [np.clip(drawn, 0, available)], [self._shape.length]
        if self._teacher is not None:
            counts.append(self._teacher.counts(drawn, available, self._num_patches))
            lengths.append(self._teacher.length)
        visual_tokens, versions = self._versions(encoded, order, counts)
        fitting = [
            [
                kept_tokens(e.token_ids, len(run), length)
                for e, run in zip(examples, runs, strict=True)
            ]
            for runs, length in zip(versions, lengths, strict=True)
        ]
        kept = np.min(fitting, axis=0)
        windows = packing.pack_together(
            [_requests(examples, runs, kept) for runs in versions],
            order.shape[0] * visual_tokens.shape[1],
            lengths,
            self._local_rows(),
            shards=len(self._shards.local),
            position_ids=self._shape.position_ids,
        )
        shown = [run for run, e in zip(versions[0], examples, strict=True) if e.has_image]
        tokens = {
            "visual_tokens": sum(map(len, shown)),
            "tokens": sum(rows[0].real_tokens for rows in windows),
        }
        if self._teacher is not None:
            tokens["teacher_tokens"] = sum(rows[1].real_tokens for rows in windows)
        return Planned(windows, visual_tokens, kept, tokens)

    def _versions(
        self, encoded: RankedTokens, order: np.ndarray, counts: Sequence[np.ndarray]
    ) -> tuple[jax.Array, list[list[Run]]]:
        """Visual tokens [B, slots, Dv] of all versions, and the run of every image in each."""
        patches = [first_patches(order, each, self._num_patches) for each in counts]
        if self._merge is None:
            visual_tokens = encoded.tokens
            slots = patches
        else:
            placed = tuple(to_global_array(each.astype(np.int32), self._mesh) for each in counts)
            visual_tokens = self._merge(encoded, placed)
            first_slots = np.arange(len(counts)) * order.shape[1]
            slots = [
                [first + np.arange(len(chosen)) for chosen in version]
                for first, version in zip(first_slots, patches, strict=True)
            ]
        stride = visual_tokens.shape[1]
        runs = [
            [
                Run((row * stride + slot).astype(np.int32), patch, self._num_patches)
                for row, (slot, patch) in enumerate(zip(*version, strict=True))
            ]
            for version in zip(slots, patches, strict=True)
        ]
        return visual_tokens, runs

    def _ranking(
        self, examples: Sequence[Example], encoded: RankedTokens
    ) -> tuple[np.ndarray, np.ndarray]:
        """Order [b, K] and number [b] of the patches of this process's images."""
        available = addressable_rows(encoded.available)
        for example, number in zip(examples, available, strict=True):
            if example.has_image:
                check_finite(example, int(number))
        return addressable_rows(encoded.order), available

    def _length(self, window: Any) -> int:
        return self._shape.length

    def _like_others(self, windows: Sequence[Any], most: int, last: int) -> list[Any]:
        empty = tuple(empty_rows(rows) for rows in windows[0])
        return [*windows, *[empty] * (most - len(windows))]

    def _unused(self, windows: Sequence[Any]) -> list[Any]:
        return []

    def _place(self, window: Any, visual_tokens: Any, image_rows: np.ndarray) -> Any:
        student, *teacher = (self._place_rows(rows, visual_tokens, image_rows) for rows in window)
        if not teacher:
            return PairBatch(student)
        at = to_global_array(teacher_columns(*(rows.targets for rows in window)), self._mesh)
        return PairBatch(student, teacher[0], at)


def first_patches(order: np.ndarray, counts: np.ndarray, num_patches: int) -> list[np.ndarray]:
    """The first patches of every image's order, int32 [count] in raster order.

    Args:
      order: [B, K] int32.
      counts: [B] int, patches per image, at most K; or `num_patches`, which takes them all.
      num_patches: N.
    """
    everything = np.arange(num_patches, dtype=np.int32)
    return [
        everything if count == num_patches else np.sort(row[:count]).astype(np.int32)
        for row, count in zip(order, counts, strict=True)
    ]


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


def _requests(
    examples: Sequence[Example], runs: Sequence[Run], kept: np.ndarray
) -> list[packing.Request]:
    return [
        cut_request(example, run, int(size))
        for example, run, size in zip(examples, runs, kept, strict=True)
    ]
