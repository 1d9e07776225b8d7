"""The second stage of the engine: windows of encoded requests, packed into rows.

A window's sequences seldom fill its last batch of rows. Those of the last batch are therefore
carried over to the next window, where they come first and others fill up their rows.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from prumerge_jax.data import packing
from prumerge_jax.data.row_lengths import cut
from prumerge_jax.data.runs import Run
from prumerge_jax.data.tokens import IGNORE
from prumerge_jax.data.visual_layout import (
    CropTokens,
    Newlines,
    run_of_picture,
)
from prumerge_jax.engine import programs
from prumerge_jax.engine.encoding import EncodedImages, Encoder, Encoding, interpolates
from prumerge_jax.engine.request import Answer, Request, Usage
from prumerge_jax.reductions import Reduction, refusal_of_crops, spell


@dataclasses.dataclass
class Counters:
    """What an engine has computed, from which speed and padding follow.

    Attributes:
      requests: answered without an error.
      images: encoded; requests of a window that share one count it once.
      crops: encoded, of all images.
      visual_tokens: valid visual tokens of the encoded crops.
      request_tokens: tokens of the requests in packed rows, each with all of its prompt.
      real_tokens, row_tokens: tokens of the packed rows without and with padding. What requests
        share counts once, so that there may be fewer than `request_tokens`.
    """

    requests: int = 0
    images: int = 0
    crops: int = 0
    visual_tokens: int = 0
    request_tokens: int = 0
    real_tokens: int = 0
    row_tokens: int = 0


@dataclasses.dataclass
class Window:
    """Requests that are planned together, with their encoded images.

    Attributes:
      requests: those that can run; first the ones carried over from the previous window.
      planned: the packing's view of them, in the same order.
      pool: [2 * window_size, R, Dv] visual tokens of the previous window and of this one.
      batches: rows to run; requests that are in none of them are carried over.
      failed: answers of the requests that cannot run.
    """

    requests: list[Request]
    planned: list[packing.Request]
    pool: jax.Array
    batches: list[packing.Rows]
    failed: list[Answer]

    def usage(self, index: int, new_tokens: int) -> Usage:
        """Token counts of request `index`."""
        visual = sum(len(run) for run in self.planned[index].runs)
        return Usage(visual, self.requests[index].text_tokens, new_tokens)


class _Admitted(NamedTuple):
    """A request that can run, and its images' runs over the slots of its window's crops.

    The slots of crop number i are i * R to (i + 1) * R.
    """

    request: Request
    runs: tuple[Run, ...]


class _CarriedOver(NamedTuple):
    """Requests of the last batch of rows, which wait for the next window, and its images."""

    admitted: list[_Admitted]
    images: EncodedImages


class WindowPlanner:
    """Turns a stream of requests into windows."""

    def __init__(
        self,
        encoder: Encoder,
        reduction: Reduction,
        position_ids: packing.PositionIds,
        counters: Counters,
        newlines: Newlines = "none",
        image_budget: int | None = None,
    ) -> None:
        self.encoder, self.model, self.shapes = encoder, encoder.model, encoder.shapes
        self.reduction, self.position_ids, self.counters = reduction, position_ids, counters
        self.newlines, self.image_budget = newlines, image_budget

    def windows(self, batches: Iterable[list[Request]]) -> Iterator[Window]:
        """Encoded windows of up to `window_size` requests each; the next one is encoded while one
        is handed out.

        Requests whose image needs more tokens than the capacity come last, encoded again at the
        largest capacity an image can need.
        """
        overflow: list[Request] = []
        yield from self._windows(batches, self.reduction, overflow)
        size = self.shapes.window_size
        again = [overflow[start : start + size] for start in range(0, len(overflow), size)]
        if again:
            beyond: list[Request] = []
            yield from self._windows(again, self.reduction.uncapped(), beyond)
            assert not beyond, f"{spell(self.reduction)} needs more than capacity_for says"

    def _windows(
        self,
        batches: Iterable[list[Request]],
        reduction: Reduction,
        overflow: list[Request],
    ) -> Iterator[Window]:
        nothing = self.encoder.encode(self.encoder.places(reduction), reduction)
        carried = _CarriedOver([], self.encoder.measure(nothing))
        for encoding, is_last in _one_ahead(self._encodings(batches, reduction)):
            images = self.encoder.measure(encoding)
            admitted, failed = self._admit(encoding, images, overflow)
            window = self._pack(carried, admitted, images, failed)
            waiting = [] if is_last else self._hold_back(window, len(carried.admitted))
            both = carried.admitted + admitted
            carried = _CarriedOver([both[index] for index in waiting], images)
            self._count(encoding, images, window)
            yield window

    def _encodings(
        self, batches: Iterable[list[Request]], reduction: Reduction
    ) -> Iterator[Encoding]:
        """Windows of batches: several of one whose crops are more than a window holds."""
        for batch in batches:
            places = self.encoder.places(reduction)
            for request in batch:
                if places.add(request):
                    continue
                if places.requests:
                    yield self.encoder.encode(places, reduction)
                    places = self.encoder.places(reduction)
                if not places.add(request):
                    places.refuse(request)
            yield self.encoder.encode(places, reduction)

    def _admit(
        self, encoding: Encoding, images: EncodedImages, overflow: list[Request]
    ) -> tuple[list[_Admitted], list[Answer]]:
        """The requests that can run and the answers of those that cannot.

        Those one of whose crops needs more tokens than its capacity are added to `overflow`.
        """
        size, _, capacity = images.patch_indices.shape
        encoded = encoding.reduction.capacity_for(self.model.config.vision.num_patches)
        crops = CropTokens(
            images.lengths.T.reshape(-1),
            images.patch_indices.swapaxes(0, 1).reshape(-1, capacity),
            self.model.config.vision.num_patches,
            cls_slot=encoded if self.encoder.slots(encoding.reduction) > encoded else None,
            raster=images.raster,
        )
        required = images.required.T.reshape(-1)
        admitted, failed = [], []
        for request, numbers in zip(encoding.places.requests, encoding.places.numbers, strict=True):
            needed = required[[number for image in numbers for number in image]]
            if (needed > encoded).any():
                overflow.append(request)
                continue
            refused = encoding.places.refused.get(request.key)
            error = refused or self._refuses_crops(request) or _broken(required, numbers)
            runs = () if error else self._runs(request, crops, numbers, encoding.reduction)
            visual_tokens = sum(len(run) for run in runs)
            error = error or self._refusal(request, visual_tokens)
            if error is None:
                admitted.append(_Admitted(request, runs))
            else:
                usage = Usage(visual_tokens, request.text_tokens, 0)
                failed.append(Answer(request.key, (), float("nan"), "error", usage, error))
        return admitted, failed

    def _runs(
        self,
        request: Request,
        crops: CropTokens,
        numbers: Sequence[tuple[int, ...]],
        reduction: Reduction,
    ) -> tuple[Run, ...]:
        """A run for each image of a request, whose crops have these numbers."""
        runs = []
        for image, rows in zip(request.images, numbers, strict=True):
            layout = image.layout_on(self.model.config.vision.grid)
            run = run_of_picture(
                crops,
                layout,
                rows,
                selects_patches=reduction.selects_patches,
                newlines=self.newlines,
                budget=self.image_budget,
            )
            runs.append(run)
        return tuple(runs)

    def _pack(
        self,
        carried: _CarriedOver,
        admitted: list[_Admitted],
        images: EncodedImages,
        failed: list[Answer],
    ) -> Window:
        """All requests in rows, those carried over in the first ones."""
        size, batches, capacity = images.patch_indices.shape

        def planned(each: _Admitted, first_batch: int) -> packing.Request:
            """`first_batch`: where the pool has the batches of the request's window."""
            return _planned(
                each.request,
                tuple(_in_pool(run, images.patch_indices.shape, first_batch) for run in each.runs),
            )

        everything = [planned(each, 0) for each in carried.admitted]
        everything += [planned(each, batches) for each in admitted]
        rows = packing.pack_window(
            everything,
            size * 2 * batches * capacity,
            self.shapes.row_length,
            self.shapes.prefill_rows,
            shards=self.model.shards,
            position_ids=self.position_ids,
            carried_over=len(carried.admitted),
            share_prefixes=self.shapes.share_prefixes,
            with_taps=interpolates(self.model.config, self.reduction),
        )
        return Window(
            [each.request for each in carried.admitted + admitted],
            everything,
            programs.join(carried.images.tokens + images.tokens, capacity=capacity),
            [cut(each, self.shapes.row_lengths) for each in rows],
            failed,
        )

    def _hold_back(self, window: Window, carried_over: int) -> list[int]:
        """Takes the last batch out of a window, and returns the requests that were in it.

        No request waits twice: its image is in the pool for two windows only.
        """
        if not window.batches or window.batches[-1].requests[0] < carried_over:
            return []
        return window.batches.pop().requests.tolist()

    def _count(self, encoding: Encoding, images: EncodedImages, window: Window) -> None:
        crops = np.array(sorted(encoding.places.crops), np.int64)
        size = len(images.lengths)
        self.counters.images += encoding.places.num_images
        self.counters.crops += len(crops)
        self.counters.visual_tokens += int(images.lengths[crops % size, crops // size].sum())
        for rows in window.batches:
            self.counters.request_tokens += rows.request_tokens
            self.counters.real_tokens += rows.real_tokens
            self.counters.row_tokens += rows.segment_ids.size

    def _refusal(self, request: Request, visual_tokens: int) -> str | None:
        """Why a request cannot run; None if it can."""
        if request.images and (reason := self._unread_question(request)):
            return reason
        length = request.text_tokens + visual_tokens + len(request.continuation)
        max_positions = self.model.config.text.max_positions
        if length > min(self.shapes.longest_prompt, max_positions):
            return (
                f"the prompt has {length} tokens ({visual_tokens} of them visual); the engine "
                f"takes {self.shapes.longest_prompt}, the model {max_positions}. Nothing is "
                "truncated: shorten it, or raise row_length if the model allows"
            )
        limit = min(self.shapes.cache_length, max_positions)
        if not len(request.continuation) and length + request.sampling.max_new_tokens > limit:
            return (
                f"the prompt has {length} tokens and {request.sampling.max_new_tokens} may follow; "
                f"the limit is {limit}. Lower max_new_tokens, or raise cache_length if the model "
                "allows"
            )
        return None

    def _refuses_crops(self, request: Request) -> str | None:
        """Why the reduction cannot take an image's tiles; None if it can or need not."""
        layouts = [image.layout for image in request.images]
        tiled = any(each is not None and each.num_crops > 1 and not each.frames for each in layouts)
        return refusal_of_crops(self.reduction) if tiled else None

    def _unread_question(self, request: Request) -> str | None:
        """Why the reduction cannot read the request's question; None if it can or need not."""
        most, tokens = self.reduction.question_tokens, len(request.question_ids)
        if most and not tokens:
            return f"the reduction {spell(self.reduction)} reads the question, but there is none"
        if tokens > most > 0:
            return (
                f"the question's keywords have {tokens} tokens; the reduction reads {most}: "
                f"shorten it, or set question_tokens={tokens}"
            )
        return None


def _broken(required: np.ndarray, numbers: Sequence[tuple[int, ...]]) -> str | None:
    """The first crop of a request for which the tower gave no finite numbers; None without one."""
    for image, crops in enumerate(numbers):
        for crop, number in enumerate(crops):
            if required[number] < 0:
                name = "the image" if len(numbers) == 1 else f"image {image}"
                where = name if len(crops) == 1 else f"crop {crop} of {name}"
                return (
                    f"the vision tower's attention is not finite on {where}; check the image and "
                    "the weights"
                )
    return None


def _in_pool(run: Run, shape: Sequence[int], first_batch: int) -> Run:
    """A run over the slots of a window's crops, as one over those of the pool.

    The pool has the batches of two windows in the order of `programs.join`: on a mesh no crop
    leaves the device that encoded it.

    Args:
      run: the run; newlines stay what they are.
      shape: B, batches and R of the window.
      first_batch: where the pool has the window's first batch.
    """
    size, batches, capacity = shape

    def moved(index: np.ndarray) -> np.ndarray:
        number, slot = np.divmod(index, capacity)
        row = number % size * 2 * batches + first_batch + number // size
        return np.where(index < 0, index, row * capacity + slot).astype(np.int32)

    taps = None if run.taps is None else run.taps._replace(slots=moved(run.taps.slots))
    return dataclasses.replace(run, index=moved(run.index), taps=taps)


def window_end(waiting: Sequence[Request]) -> int:
    """How many of the waiting requests are in the next window, if it is no larger than all but one
    of them: those of the last set of images stay for the one after it where they go on there, and
    are less than half a window."""
    names = [_image_names(request) for request in waiting]
    end = len(waiting) - 1
    cut = end
    while cut and names[-1] and names[cut - 1] == names[-1]:
        cut -= 1
    return cut if cut > end / 2 else end


def _image_names(request: Request) -> tuple[str, ...]:
    """The keys of a request's images; empty where one has none."""
    keys = [image.key for image in request.images]
    return tuple(key for key in keys if key is not None) if None not in keys else ()


def _one_ahead(encodings: Iterator[Encoding]) -> Iterator[tuple[Encoding, bool]]:
    """Each encoding and whether it is the last; the next one is dispatched before."""
    current = next(encodings, None)
    while current is not None:
        following = next(encodings, None)
        yield current, following is None
        current = following


def _planned(request: Request, images: tuple[Run, ...]) -> packing.Request:
    """The packing's view of a request: prompt and continuation, the latter to be predicted."""
    token_ids = np.concatenate([request.token_ids, request.continuation]).astype(np.int32)
    labels = np.full(token_ids.shape, IGNORE, np.int32)
    labels[len(request.token_ids) :] = request.continuation
    return packing.Request(token_ids, images, labels)
