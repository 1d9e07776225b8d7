"""From lists of examples to micro-batches of packed rows on the devices.

A global batch is a fixed number of samples. How many visual tokens they have is known only once
their images are encoded; then they are packed into as many micro-batches of one shape as they need,
of which the last may have shorter rows. The images of the next batch are encoded while the current
step runs; a batch of text alone skips the tower.

Each process reads, encodes and packs the samples of its data shards. All run the same number of
micro-batches: those that need fewer add empty rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from prumerge_jax.data import packing
from prumerge_jax.data.pipeline import Example
from prumerge_jax.data.row_lengths import cut, lengthened
from prumerge_jax.data.runs import NO_SLOT, Run, Taps
from prumerge_jax.data.tokens import IGNORE, IMAGE_TOKEN
from prumerge_jax.data.visual_layout import CropTokens, runs
from prumerge_jax.messages import quoted
from prumerge_jax.prumerge import VisualTokens
from prumerge_jax.sharding.processes import (
    DataShards,
    addressable_rows,
    allgather_ints,
    to_global_array,
)
from prumerge_jax.training.parts import EncoderInParts
from prumerge_jax.training.sample_sizes import kept_tokens
from prumerge_jax.training.weights import Leaf

SHORTEST_ROW = 512
"""The last micro-batch of a step has rows of a multiple of this: every length is one more program
to compile, and shorter rows would wait for the weights of a mesh rather than compute."""


class RowBatch(NamedTuple):
    """A micro-batch on the device; the fields [rows, T] int32 are those of `packing.Rows`.

    Attributes:
      visual_tokens: [B, R, Dv] of all images of the global batch; its dtype is the compute dtype.
      visual_weight: see `LlavaModel.embed_rows`; None where no token is interpolated.
    """

    ids: Leaf
    visual_index: Leaf
    positions: Leaf
    segment_ids: Leaf
    targets: Leaf
    visual_tokens: Leaf
    visual_weight: Leaf | None = None


class GlobalBatch(NamedTuple):
    """One global batch, ready for a step.

    Attributes:
      batches: its micro-batches; of the first batch of a run also an empty one of every length that
        they do not have.
      samples: samples used so far over all processes, this batch included: where a resumed run
        continues.
      counts: totals over all processes, for the record. `samples`, `images`; `visual_tokens` of all
        images after the reduction; `tokens`, real positions of all rows, and `positions`, computed
        ones; `truncated_samples`, cut to the row length; `mismatched_samples`, of which nothing is
        learned because their rounds did not add up.
    """

    batches: list[Any]
    samples: int
    counts: dict[str, int]


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The shape of a micro-batch.

    Attributes:
      rows: number of rows on all devices together; a multiple of the mesh's data shards.
      length: T, also the longest sample: what is beyond is cut off, as in LLaVA, and counted.
      position_ids: see `packing.pack_window`.
    """

    rows: int
    length: int
    position_ids: packing.PositionIds = "compact"

    @property
    def lengths(self) -> tuple[int, ...]:
        """T of the last micro-batch of a step: the first of these that is enough; ascending."""
        return (*range(SHORTEST_ROW, self.length, SHORTEST_ROW), self.length)


class Planned(NamedTuple):
    """The rows of a global batch on this process.

    Attributes:
      windows: one entry per micro-batch, at least one.
      visual_tokens: [B, R, Dv] of all images, on the devices.
      kept: tokens of text that are left of every sample, [local samples].
      counts: `visual_tokens`, `tokens` of `GlobalBatch.counts`, and what else there is to count.
    """

    windows: list[Any]
    visual_tokens: jax.Array
    kept: np.ndarray
    counts: dict[str, int]


class BatchPacker:
    """Encodes, packs and places the batches of a run.

    Args:
      encode: images [b, S, S, 3] uint8 on the devices -> their visual tokens; called for parts of a
        batch, see `parts.py`.
      num_patches: N, the patches of an unreduced image.
      shape: shape of the rows.
      mesh: the devices.
    """

    def __init__(
        self,
        encode: Callable[..., Any],
        *,
        num_patches: int,
        shape: RowShape,
        mesh: Mesh,
    ) -> None:
        self._encode = EncoderInParts(encode, mesh)
        self._num_patches = num_patches
        self._shape = shape
        self._mesh = mesh
        self._shards = DataShards.of(mesh)

    def __call__(self, batches: Iterable[list[Example]], samples: int) -> Iterator[GlobalBatch]:
        """Prepares global batches, encoding one ahead.

        Args:
          batches: this process's samples of each global batch.
          samples: used before the first of them, over all processes.
        """
        for number, (examples, encoded) in enumerate(self._one_ahead(batches)):
            samples += self._global(len(examples))
            yield self._prepare(examples, encoded, samples, is_first=number == 0)

    def _one_ahead(self, batches: Iterable[list[Example]]) -> Iterator[tuple[list[Example], Any]]:
        """The samples and their encoded images, given when those of the next are being encoded."""
        waiting: tuple[list[Example], Any] | None = None
        for examples in batches:
            ahead = examples, self._encoded(examples)
            if waiting is not None:
                yield waiting
            waiting = ahead
        if waiting is not None:
            yield waiting

    def _encoded(self, examples: Sequence[Example]) -> Any:
        # The tower is one computation of all processes: it runs where any of them has an image.
        needed = allgather_ints([any(example.has_image for example in examples)]).any()
        pixels = np.stack([example.pixels for example in examples])
        rows = len(examples) // len(self._shards.local)
        return self._encode(pixels, used=rows if needed else 0)

    def _global(self, rows: int) -> int:
        return rows * self._shards.total // len(self._shards.local)

    def _prepare(
        self, examples: Sequence[Example], encoded: Any, samples: int, *, is_first: bool
    ) -> GlobalBatch:
        image_rows = np.array(self._shards.rows(self._global(len(examples))))
        first = samples - self._global(len(examples))
        windows, visual_tokens, kept, tokens = self._plan(examples, encoded, first + image_rows)
        sizes = np.array([example.token_ids.size for example in examples])
        counts = {
            "samples": len(examples),
            "images": sum(example.has_image for example in examples),
            **tokens,
            "truncated_samples": int((kept < sizes).sum()),
            "mismatched_samples": sum(bool(example.mismatch) for example in examples),
        }
        everyone = allgather_ints([len(windows), self._length(windows[-1]), *counts.values()])
        most = int(everyone[:, 0].max())
        last = int(everyone[everyone[:, 0] == most, 1].max())
        sums = everyone[list(self._shards.representatives), 2:].sum(0)
        counts = dict(zip(counts, sums.tolist(), strict=True))
        counts["positions"] = ((most - 1) * self._shape.length + last) * self._shape.rows
        windows = self._like_others(windows, most, last)
        if is_first:
            windows += self._unused(windows)
        batches = [self._place(window, visual_tokens, image_rows) for window in windows]
        return GlobalBatch(batches, samples, counts)

    def _plan(self, examples: Sequence[Example], encoded: Any, places: np.ndarray) -> Planned:
        """The rows of this process's samples, which have these places in the stream."""
        crops = self._measure(examples, encoded)
        requests = [
            fit_request(example, run, self._shape.length)
            for example, run in zip(examples, runs(crops, range(len(examples))), strict=True)
        ]
        has_image = np.array([example.has_image for example in examples])
        shown = int(crops.lengths[has_image].sum())
        return self._packed(requests, crops.num_slots, encoded.tokens, shown)

    def _packed(
        self,
        requests: Sequence[packing.Request],
        num_slots: int,
        visual_tokens: jax.Array,
        shown: int,
        *,
        with_taps: bool = False,
    ) -> Planned:
        """Samples in rows.

        Args:
          requests: the samples.
          num_slots, with_taps: see `packing.pack_window`.
          visual_tokens: see `Planned`.
          shown: visual tokens of all images.
        """
        pack = functools.partial(
            packing.pack_window,
            num_slots=num_slots,
            num_rows=self._local_rows(),
            shards=len(self._shards.local),
            position_ids=self._shape.position_ids,
            with_taps=with_taps,
        )
        windows = fewest_positions(requests, pack, self._shape.lengths)
        counts = {
            "visual_tokens": shown,
            "tokens": sum(rows.real_tokens for rows in windows),
        }
        kept = np.array([request.token_ids.size for request in requests])
        return Planned(windows, visual_tokens, kept, counts)

    def _local_rows(self) -> int:
        """Rows of a micro-batch on this process."""
        return self._shape.rows // self._shards.total * len(self._shards.local)

    def _measure(self, examples: Sequence[Example], visual: VisualTokens) -> CropTokens:
        """What the planner must know of the encoded images, fetched from the devices.

        Raises:
          FloatingPointError: the tower's attention is not finite for an image.
          ValueError: an image needs more visual tokens than the capacity.
        """
        required = addressable_rows(visual.required)
        capacity = visual.tokens.shape[1]
        for example, needed in zip(examples, required, strict=True):
            if example.has_image:
                self._check_required(example, np.array([needed]), capacity)
        return CropTokens(
            addressable_rows(visual.lengths),
            addressable_rows(visual.patch_indices),
            self._num_patches,
        )

    def _check_required(self, example: Example, required: np.ndarray, capacity: int) -> None:
        """Raises what `_measure` does for the tokens that a sample's crops need, [crops]."""
        check_finite(example, int(required.min(initial=0)))
        if (needed := int(required.max(initial=0))) > capacity:
            raise ValueError(
                f"the image of sample {quoted(example.id)} needs {needed} visual tokens, the "
                f"capacity is {capacity}; give the reduction more, as in --config.reduction="
                f"prumerge:capacity={needed}, or none for the most any image can need"
            )

    def _length(self, window: Any) -> int:
        """T of a micro-batch."""
        return int(window.ids.shape[1])

    def _like_others(self, windows: Sequence[Any], most: int, last: int) -> list[Any]:
        """As many micro-batches as the process with the most, the last with rows as long."""
        if len(windows) == most:
            return [*windows[:-1], lengthened(windows[-1], last)]
        full = [lengthened(window, self._shape.length) for window in windows]
        empty = empty_rows(full[0])
        return [*full, *[empty] * (most - len(windows) - 1), cut(empty, [last])]

    def _unused(self, windows: Sequence[Any]) -> list[Any]:
        """Empty micro-batches of the lengths that are not among these, with which the first step
        compiles what later ones may run."""
        used = {self._length(window) for window in windows}
        empty = empty_rows(lengthened(windows[0], self._shape.length))
        return [cut(empty, [length]) for length in self._shape.lengths if length not in used]

    def _place(
        self, window: packing.Rows, visual_tokens: jax.Array, image_rows: np.ndarray
    ) -> RowBatch:
        return self._place_rows(window, visual_tokens, image_rows)

    def _place_rows(
        self, rows: packing.Rows, visual_tokens: jax.Array, image_rows: np.ndarray
    ) -> RowBatch:
        # The plan numbers the images of this process, the arrays those of the global batch.
        given, weight = (rows.visual_index, None) if rows.taps is None else rows.taps
        image, slot = np.divmod(given, visual_tokens.shape[1])
        visual_index = image_rows[image] * visual_tokens.shape[1] + slot
        visual_index = np.where(given < 0, given, visual_index)
        return RowBatch(
            ids=to_global_array(rows.ids, self._mesh),
            visual_index=to_global_array(visual_index.astype(np.int32), self._mesh),
            positions=to_global_array(rows.positions, self._mesh),
            segment_ids=to_global_array(rows.segment_ids, self._mesh),
            targets=to_global_array(rows.targets, self._mesh),
            visual_tokens=visual_tokens,
            visual_weight=None if weight is None else to_global_array(weight, self._mesh),
        )


def fewest_positions(
    requests: Sequence[packing.Request],
    pack: Callable[..., list[packing.Rows]],
    lengths: Sequence[int],
) -> list[packing.Rows]:
    """Micro-batches of samples, the last with rows as short as its samples allow.

    Args:
      requests: the samples.
      pack: (samples, row_length=T) -> their micro-batches.
      lengths: T of the last one, ascending; the last of these is that of all others.
    """
    windows = pack(requests, row_length=lengths[-1])
    of_last = [requests[index] for index in windows[-1].requests]
    longest = windows[-1].length_of.max(initial=0)
    for length in lengths[:-1]:
        shorter = pack(of_last, row_length=length) if longest <= length else []
        if len(shorter) == 1:
            return [*windows[:-1], *shorter]
    return windows


def check_finite(example: Example, required: int) -> None:
    """Raises FloatingPointError where the tokens that an image requires are -1."""
    if required < 0:
        raise FloatingPointError(
            f"the vision tower's attention is not finite on the image of sample "
            f"{quoted(example.id)}"
        )


def fit_request(example: Example, run: Run, length: int) -> packing.Request:
    """The longest beginning of a sample that fits into `length` tokens; see `kept_tokens`."""
    return cut_request(example, run, kept_tokens(example.token_ids, len(run), length))


def cut_request(example: Example, run: Run, kept: int) -> packing.Request:
    """The first `kept` tokens of a sample."""
    is_image = example.token_ids == IMAGE_TOKEN
    return packing.Request(
        example.token_ids[:kept], (run,) * int(is_image[:kept].sum()), example.labels[:kept]
    )


def empty_rows(rows: packing.Rows) -> packing.Rows:
    """Rows of the same shape without a segment."""
    none = np.zeros(0, np.int32)
    return packing.Rows(
        ids=np.zeros_like(rows.ids),
        visual_index=np.full_like(rows.visual_index, -1),
        positions=np.zeros_like(rows.positions),
        segment_ids=np.zeros_like(rows.segment_ids),
        targets=np.full_like(rows.targets, IGNORE),
        requests=none,
        row_of=none,
        start_of=none,
        length_of=none,
        prefix_start_of=none,
        prefix_length_of=none,
        branch_ids=None,
        taps=None if rows.taps is None else _empty_taps(rows.taps),
    )


def _empty_taps(taps: Taps) -> Taps:
    """Taps of the same shape that are of no token."""
    return Taps(np.full_like(taps.slots, NO_SLOT), np.zeros_like(taps.weight))
