"""Continuous-batching decode: sequences move from packed rows into slots, and free slots are
refilled while the others continue."""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prumerge_jax.data import packing
from prumerge_jax.engine import programs
from prumerge_jax.engine.encoding import PlacedModel
from prumerge_jax.engine.request import Answer, Delta, FinishReason, Request
from prumerge_jax.engine.shapes import EngineShapes
from prumerge_jax.engine.windows import Window
from prumerge_jax.models.config import MAX_STOP_IDS
from prumerge_jax.models.llama import KVCache


class SlotDecoder:
    """The slots of one run, and which request is in which."""

    def __init__(self, model: PlacedModel, shapes: EngineShapes, *, key_bias: bool = False) -> None:
        self.model, self.shapes = model, shapes
        empty = programs.empty_slots(
            model.graphdef,
            model.state,
            slots=shapes.slots,
            length=shapes.cache_length,
            dtype=model.dtype,
            key_bias=key_bias,
        )
        self.slots = model.commit(empty)
        self.occupant: list[_Sequence | None] = [None] * shapes.slots
        self.unread: collections.deque[_Chunk] = collections.deque()

    def run(self, window: Window, rows: packing.Rows) -> Iterator[Delta | Answer]:
        """Prefills rows and decodes until the last of their sequences has a slot."""
        model = self.model
        placed = model.put_rows(rows)
        hidden, cache = programs.prefill(
            model.graphdef,
            model.state,
            window.pool,
            placed,
            max_segment_length=self.shapes.longest_prompt,
        )
        for segments, sequences in self._segments(window, rows):
            first = programs.first_tokens(model.graphdef, model.state, hidden, segments)
            yield from self._run_segments(cache, placed, segments, first, sequences)

    def drain(self) -> Iterator[Delta | Answer]:
        """Decodes until every slot is free."""
        while any(self.occupant) or self.unread:
            yield from self._step()

    def _segments(
        self, window: Window, rows: packing.Rows
    ) -> Iterator[tuple[programs.Segments, list["_Sequence"]]]:
        """The sequences of a batch of rows, in groups as large as there are slots."""
        size = self.shapes.slots
        for begin in range(0, len(rows.requests), size):
            part = slice(begin, begin + size)
            sequences = [
                _Sequence(window, index, self._stop_ids(window.requests[index]))
                for index in rows.requests[part].tolist()
            ]
            place = (rows.row_of[part], rows.start_of[part], rows.length_of[part])
            yield _device_segments(place, sequences, size), sequences

    def _stop_ids(self, request: Request) -> tuple[int, ...]:
        chosen = request.sampling.stop_ids
        return self.model.config.eos_token_ids if chosen is None else chosen

    def _run_segments(
        self,
        cache: KVCache,
        rows: programs.Rows,
        segments: programs.Segments,
        first: jax.Array,
        sequences: list["_Sequence"],
    ) -> Iterator[Delta | Answer]:
        # A sequence of one token is complete with its first token and needs no slot.
        waiting = [i for i, sequence in enumerate(sequences) if sequence.limit > 1]
        self.unread.append(_Chunk(first[None], list(sequences)))
        while waiting:
            free = [slot for slot, occupant in enumerate(self.occupant) if occupant is None]
            if free:
                slot_of = np.full(len(self.occupant), -1, np.int32)
                for slot, index in zip(free, waiting, strict=False):
                    slot_of[index] = slot
                    self.occupant[slot] = sequences[index]
                waiting = waiting[len(free) :]
                self.slots = programs.insert(
                    self.slots, cache, rows, segments, first, jnp.asarray(slot_of)
                )
            if waiting:
                yield from self._step()
                # A first token that was read in the meantime may have been the last one too.
                waiting = [i for i in waiting if not sequences[i].done]
        yield from self._read(unread=1)

    def _step(self) -> Iterator[Delta | Answer]:
        """Dispatches one chunk, then reads the results of the one before."""
        if any(self.occupant):
            model = self.model
            self.slots, emitted = programs.decode(
                model.graphdef,
                model.state,
                self.slots,
                steps=self.shapes.decode_steps_per_call,
            )
            self.unread.append(_Chunk(emitted, list(self.occupant)))
            yield from self._read(unread=1)
        else:
            yield from self._read(unread=0)

    def _read(self, unread: int) -> Iterator[Delta | Answer]:
        """Reads chunks until only `unread` are left."""
        while len(self.unread) > unread:
            chunk = self.unread.popleft()
            for column, sequence in zip(np.asarray(chunk.tokens).T, chunk.sequences, strict=False):
                if sequence is None or sequence.done:
                    continue
                delta = sequence.extend(column[column >= 0].tolist())
                if delta.token_ids:
                    yield delta
                if sequence.done:
                    if sequence in self.occupant:
                        self.occupant[self.occupant.index(sequence)] = None
                    yield sequence.answer()


@dataclasses.dataclass(eq=False)
class _Sequence:
    """A request being decoded: its place in its window, and the tokens read so far."""

    window: Window
    index: int
    stop_ids: tuple[int, ...]
    tokens: list[int] = dataclasses.field(default_factory=list)

    @property
    def request(self) -> Request:
        return self.window.requests[self.index]

    @property
    def limit(self) -> int:
        return self.request.sampling.max_new_tokens

    @property
    def stopped(self) -> bool:
        return bool(self.tokens) and self.tokens[-1] in self.stop_ids

    @property
    def done(self) -> bool:
        return self.stopped or len(self.tokens) >= self.limit

    def extend(self, tokens: list[int]) -> Delta:
        """Appends tokens; the delta has them without the stop id."""
        self.tokens += tokens
        return Delta(self.request.key, tuple(tokens[:-1] if self.stopped else tokens))

    def answer(self) -> Answer:
        tokens = tuple(self.tokens[:-1] if self.stopped else self.tokens)
        usage = self.window.usage(self.index, len(tokens))
        reason: FinishReason = "stop" if self.stopped else "length"
        return Answer(self.request.key, tokens, float("nan"), reason, usage)


class _Chunk(NamedTuple):
    """Tokens [steps, S] on the device, and whose they are; a column without a sequence is idle."""

    tokens: jax.Array
    sequences: list[_Sequence | None]


def _device_segments(
    place: tuple[np.ndarray, np.ndarray, np.ndarray], sequences: Sequence[_Sequence], size: int
) -> programs.Segments:
    """Sequences as arrays of `size`; `place` has rows, starts and lengths [sequences]."""

    def padded(values: Sequence[float] | np.ndarray, dtype: type[np.generic]) -> jax.Array:
        column = np.zeros(size, dtype)
        column[: len(values)] = values
        return jnp.asarray(column)

    row, start, length = (padded(column, np.int32) for column in place)
    params = [sequence.request.sampling for sequence in sequences]
    stop_ids = np.full((size, MAX_STOP_IDS), -1, np.int32)
    for ids, sequence in zip(stop_ids, sequences, strict=False):
        ids[: len(sequence.stop_ids)] = sequence.stop_ids
    sampling = programs.Sampling(
        temperature=padded([each.temperature for each in params], np.float32),
        top_p=padded([each.top_p for each in params], np.float32),
        seed=padded([each.seed for each in params], np.uint32),
        stop_ids=jnp.asarray(stop_ids),
    )
    limits = padded([each.max_new_tokens for each in params], np.int32)
    return programs.Segments(row, start, length, limits, sampling)
