"""The second stage of the engine: windows of encoded requests, packed into rows.

A window's sequences seldom fill its last batch of rows. Those of the last batch are therefore
carried over to the next window, where they come first and others fill up their rows.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from prumerge_jax.data import packing
from prumerge_jax.data.tokens import IGNORE
from prumerge_jax.data.visual_layout import CropTokens, runs
from prumerge_jax.engine import programs
from prumerge_jax.engine.encoding import EncodedImages, Encoder, Encoding
from prumerge_jax.engine.request import Answer, Request, Usage
from prumerge_jax.reductions import Reduction, spell


@dataclasses.dataclass
class Counters:
    """What an engine has computed, from which speed and padding follow.

    Attributes:
      requests: answered without an error.
      images: encoded; requests of a window that share one count it once.
      visual_tokens: valid visual tokens of the encoded images.
      real_tokens, row_tokens: tokens of the packed rows without and with padding.
    """

    requests: int = 0
    images: int = 0
    visual_tokens: int = 0
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
    """A request that can run, and the number of its image in its window."""

    request: Request
    image: int | None


class _CarriedOver(NamedTuple):
    """Requests of the last batch of rows, which wait for the next window, and their images."""

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
    ) -> None:
        self.encoder, self.model, self.shapes = encoder, encoder.model, encoder.shapes
        self.reduction, self.position_ids, self.counters = reduction, position_ids, counters

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
            yield from self._windows(again, self.reduction.uncapped(), [])

    def _windows(
        self,
        batches: Iterable[list[Request]],
        reduction: Reduction,
        overflow: list[Request],
    ) -> Iterator[Window]:
        carried = _CarriedOver([], self.encoder.measure(self.encoder.encode([], reduction)))
        encodings = (self.encoder.encode(batch, reduction) for batch in batches)
        for encoding, is_last in _one_ahead(encodings):
            images = self.encoder.measure(encoding)
            admitted, failed = self._admit(encoding, images, overflow)
            window = self._pack(carried, admitted, images, failed)
            waiting = [] if is_last else self._hold_back(window, len(carried.admitted))
            both = carried.admitted + admitted
            carried = _CarriedOver([both[index] for index in waiting], images)
            self._count(encoding, images, window)
            yield window

    def _admit(
        self, encoding: Encoding, images: EncodedImages, overflow: list[Request]
    ) -> tuple[list[_Admitted], list[Answer]]:
        """The requests that can run and the answers of those that cannot.

        Those whose image needs more tokens than its capacity are added to `overflow`.
        """
        size, _, capacity = images.patch_indices.shape
        admitted, failed = [], []
        for request, image in zip(encoding.requests, encoding.image_of, strict=True):
            at = None if image is None else (image % size, image // size)
            required = 0 if at is None else int(images.required[at])
            if required > capacity:
                overflow.append(request)
                continue
            visual_tokens = 0 if at is None else int(images.lengths[at])
            error = self._refusal(request, visual_tokens, broken=required < 0)
            if error is None:
                admitted.append(_Admitted(request, image))
            else:
                usage = Usage(visual_tokens, request.text_tokens, 0)
                failed.append(Answer(request.key, (), float("nan"), "error", usage, error))
        return admitted, failed

    def _pack(
        self,
        carried: _CarriedOver,
        admitted: list[_Admitted],
        images: EncodedImages,
        failed: list[Answer],
    ) -> Window:
        """All requests in rows, those carried over in the first ones."""
        size, batches, capacity = images.patch_indices.shape
        before = carried.images
        crops = CropTokens(
            np.concatenate([before.lengths, images.lengths], axis=1).reshape(-1),
            np.concatenate([before.patch_indices, images.patch_indices], axis=1).reshape(
                -1, capacity
            ),
            self.model.config.vision.num_patches,
        )

        def planned(request: Request, image: int | None, first_batch: int) -> packing.Request:
            """`first_batch`: where the pool has the batches of the image's window."""
            if image is None:
                return _planned(request, ())
            # The order of `programs.join`: on a mesh no image leaves the device that encoded it.
            row = image % size * 2 * batches + first_batch + image // size
            return _planned(request, runs(crops, [row]))

        everything = [planned(*each, 0) for each in carried.admitted]
        everything += [planned(*each, batches) for each in admitted]
        rows = packing.pack_window(
            everything,
            crops.num_slots,
            self.shapes.row_length,
            self.shapes.prefill_rows,
            shards=self.model.shards,
            position_ids=self.position_ids,
            carried_over=len(carried.admitted),
        )
        return Window(
            [each.request for each in carried.admitted + admitted],
            everything,
            programs.join(before.tokens + images.tokens),
            rows,
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
        self.counters.images += encoding.num_images
        self.counters.visual_tokens += int(images.lengths.sum())
        self.counters.real_tokens += sum(int((r.segment_ids > 0).sum()) for r in window.batches)
        self.counters.row_tokens += sum(rows.segment_ids.size for rows in window.batches)

    def _refusal(self, request: Request, visual_tokens: int, *, broken: bool) -> str | None:
        """Why a request cannot run; None if it can."""
        if broken:
            return "the image's CLS attention is not finite; check the image and the weights"
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


def _one_ahead(encodings: Iterator[Encoding]) -> Iterator[tuple[Encoding, bool]]:
    """Each encoding and whether it is the last; the next one is dispatched before."""
    current = next(encodings, None)
    while current is not None:
        following = next(encodings, None)
        yield current, following is None
        current = following


def _planned(request: Request, images: tuple[packing.Run, ...]) -> packing.Request:
    """The packing's view of a request: prompt and continuation, the latter to be predicted."""
    token_ids = np.concatenate([request.token_ids, request.continuation]).astype(np.int32)
    labels = np.full(token_ids.shape, IGNORE, np.int32)
    labels[len(request.token_ids) :] = request.continuation
    return packing.Request(token_ids, images, labels)
