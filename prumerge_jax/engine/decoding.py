"""Continuous-batching decode: sequences come out of packed rows into slots, and free slots are
filled again while others go on."""

import collections
import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prumerge_jax.data import packing
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.engine import programs
from prumerge_jax.engine.engine import Counters, Engine, Query, Result, Window
from prumerge_jax.models.llama import KVCache


def generate(
    engine: Engine, queries: Iterable[Query], sampling: programs.Sampling | None = None
) -> Iterator[Result]:
    """Continues every query, greedily unless told otherwise. Results come in any order."""
    decoder = SlotDecoder(engine, sampling or programs.Sampling())
    for window in engine.windows(queries):
        yield from window.failed
        for rows in window.batches:
            yield from decoder.run(window, rows)
    yield from decoder.drain()


def warm_up(engine: Engine, sampling: programs.Sampling | None = None) -> None:
    """Compiles all programs of `generate` by running one meaningless query."""
    side = engine.model_config.vision.image_size
    pixels = np.zeros((side, side, 3), np.uint8)
    token_ids = np.array([engine.model_config.bos_token_id, IMAGE_TOKEN], np.int32)
    for _ in generate(engine, [Query(0, token_ids, pixels, max_new_tokens=2)], sampling):
        pass
    engine.counters = Counters()


class SlotDecoder:
    """The slots of one engine, and which query is in which."""

    def __init__(self, engine: Engine, sampling: programs.Sampling) -> None:
        self.engine, self.sampling = engine, sampling
        self.slots = programs.empty_slots(
            engine.graphdef,
            engine.state,
            slots=engine.config.slots,
            length=engine.config.cache_length,
            dtype=engine.dtype,
        )
        self.occupant: list[_Sequence | None] = [None] * engine.config.slots
        self.unread: collections.deque[_Chunk] = collections.deque()

    def run(self, window: Window, rows: packing.Rows) -> Iterator[Result]:
        """Prefills rows and decodes until the last of their sequences has a slot."""
        engine = self.engine
        placed = engine.put_rows(rows)
        hidden, cache = programs.prefill(
            engine.graphdef,
            engine.state,
            window.pool,
            placed,
            max_segment_length=engine.config.longest_prompt,
        )
        for segments, sequences in self._segments(window, rows):
            first = programs.first_tokens(
                engine.graphdef, engine.state, hidden, segments, sampling=self.sampling
            )
            yield from self._run_segments(cache, placed, segments, first, sequences)

    def drain(self) -> Iterator[Result]:
        """Decodes until every slot is free."""
        while any(self.occupant) or self.unread:
            yield from self._step()

    def _segments(
        self, window: Window, rows: packing.Rows
    ) -> Iterator[tuple[programs.Segments, list["_Sequence"]]]:
        """The sequences of a batch of rows, in groups as large as there are slots."""
        size = self.engine.config.slots
        for begin in range(0, len(rows.requests), size):
            part = slice(begin, begin + size)
            queries = [window.queries[i] for i in rows.requests[part]]
            columns = (
                rows.row_of[part],
                rows.start_of[part],
                rows.length_of[part],
                np.array([q.max_new_tokens for q in queries], np.int32),
                np.array([q.seed for q in queries], np.uint32),
            )
            padded = (np.pad(column, (0, size - len(queries))) for column in columns)
            sequences = [
                _Sequence(query, window.visual_tokens(i), [])
                for query, i in zip(queries, rows.requests[part], strict=True)
            ]
            yield programs.Segments(*(jnp.asarray(column) for column in padded)), sequences

    def _run_segments(
        self,
        cache: KVCache,
        rows: programs.Rows,
        segments: programs.Segments,
        first: jax.Array,
        sequences: list["_Sequence"],
    ) -> Iterator[Result]:
        # A sequence of one token is complete with its first token and needs no slot.
        waiting = [i for i, s in enumerate(sequences) if s.query.max_new_tokens > 1]
        self.unread.append(_Chunk(first[None], list(sequences)))
        eos = self.engine.model_config.eos_token_id
        while waiting:
            free = [slot for slot, occupant in enumerate(self.occupant) if occupant is None]
            if free:
                slot_of = np.full(len(self.occupant), -1, np.int32)
                for slot, index in zip(free, waiting, strict=False):
                    slot_of[index] = slot
                    self.occupant[slot] = sequences[index]
                waiting = waiting[len(free) :]
                self.slots = programs.insert(
                    self.slots,
                    cache,
                    rows,
                    segments,
                    first,
                    jnp.asarray(slot_of),
                    eos=eos,
                )
            if waiting:
                yield from self._step()
                # A first token that was read meanwhile may have been the last one too.
                waiting = [i for i in waiting if not sequences[i].done(eos)]
        yield from self._read(behind=1)

    def _step(self) -> Iterator[Result]:
        """Dispatches one chunk, then reads the results of the one before."""
        if any(self.occupant):
            engine = self.engine
            self.slots, emitted = programs.decode(
                engine.graphdef,
                engine.state,
                self.slots,
                steps=engine.config.chunk,
                eos=engine.model_config.eos_token_id,
                sampling=self.sampling,
            )
            self.unread.append(_Chunk(emitted, list(self.occupant)))
            yield from self._read(behind=1)
        else:
            yield from self._read(behind=0)

    def _read(self, behind: int) -> Iterator[Result]:
        """Reads chunks until only `behind` are left unread."""
        eos = self.engine.model_config.eos_token_id
        while len(self.unread) > behind:
            chunk = self.unread.popleft()
            for column, sequence in zip(np.asarray(chunk.tokens).T, chunk.sequences, strict=False):
                if sequence is None or sequence.done(eos):
                    continue
                sequence.tokens.extend(column[column >= 0].tolist())
                if sequence.done(eos):
                    if sequence in self.occupant:
                        self.occupant[self.occupant.index(sequence)] = None
                    yield sequence.result(eos)


@dataclasses.dataclass(eq=False)
class _Sequence:
    """A query being decoded and the tokens read so far."""

    query: Query
    visual_tokens: int
    tokens: list[int]

    def done(self, eos: int) -> bool:
        ended = bool(self.tokens) and self.tokens[-1] == eos
        return ended or len(self.tokens) >= self.query.max_new_tokens

    def result(self, eos: int) -> Result:
        tokens = self.tokens[:-1] if self.tokens[-1] == eos else self.tokens
        text_tokens = self.query.text_tokens
        return Result(self.query.key, tokens, float("nan"), self.visual_tokens, text_tokens)


class _Chunk(NamedTuple):
    """Tokens [steps, S] on the device, and whose they are; a column without a sequence is idle."""

    tokens: jax.Array
    sequences: list[_Sequence | None]
