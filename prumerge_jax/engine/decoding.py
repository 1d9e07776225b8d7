"""Continuous-batching decode: prompts go from packed rows into pages, sequences get slots, and free
slots are refilled while the others continue.

Pages are given out before every call of `programs.decode`, as many as its steps may fill, and come
back when a sequence has ended.
"""

import collections
import dataclasses
from collections.abc import Container, Iterable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prumerge_jax.data import packing
from prumerge_jax.engine import programs
from prumerge_jax.engine.encoding import PlacedModel
from prumerge_jax.engine.pages import Claim, PagePool, can_finish
from prumerge_jax.engine.prompt_pages import PromptPages
from prumerge_jax.engine.request import Answer, Delta, FinishReason, Request
from prumerge_jax.engine.sampling import Sampling
from prumerge_jax.engine.shapes import EngineShapes
from prumerge_jax.engine.windows import Window
from prumerge_jax.models.config import MAX_STOP_IDS
from prumerge_jax.reductions import Drops


class SlotDecoder:
    """Slots and pages, and which request is in which.

    Attributes:
      pools: the pages of each data shard.
    """

    def __init__(
        self,
        model: PlacedModel,
        shapes: EngineShapes,
        *,
        key_bias: bool = False,
        drops: Drops | None = None,
    ) -> None:
        self.model, self.shapes, self._drops = model, shapes, drops
        self.slots = model.commit(programs.empty_slots(slots=shapes.slots))
        pages = programs.empty_pages(
            model.graphdef,
            model.state,
            pages=shapes.pool_pages,
            page_size=shapes.page_size,
            dtype=model.page_dtype,
            key_bias=key_bias or drops is not None,
        )
        self.pages = model.commit(pages)
        self.pools = [PagePool(shapes.pool_pages // model.shards) for _ in range(model.shards)]
        self._occupant: list[_Sequence | None] = [None] * shapes.slots
        self._in_rows: _InRows | None = None
        self._unseated: collections.deque[_Unseated] = collections.deque()
        self._unread: collections.deque[_Chunk] = collections.deque()

    @property
    def wants_rows(self) -> bool:
        """Whether every sequence that was taken has a slot or has ended."""
        return self._in_rows is None and not self._unseated

    @property
    def valid_tokens(self) -> int:
        """Tokens in pages, those of calls that are under way included; shared ones count once."""
        size, tokens = self.shapes.page_size, dict[tuple[int, int], int]()
        for sequence in self._sequences():
            for nth, page in enumerate(sequence.pages):
                there = min(size, sequence.length - nth * size)
                key = sequence.shard, page
                tokens[key] = max(tokens.get(key, 0), there)
        return sum(tokens.values())

    @property
    def taken_pages(self) -> int:
        """Pages that are not free."""
        return sum(pool.size - pool.free for pool in self.pools)

    def take(self, window: Window, rows: packing.Rows, dropped: Container[int] = ()) -> None:
        """Takes the sequences of a batch of rows, but for those of the dropped keys.

        To be called where `wants_rows`.
        """
        rows_per_shard = len(rows.ids) // self.model.shards
        sequences = []
        for place, index in enumerate(rows.requests.tolist()):
            request = window.requests[index]
            if request.key not in dropped:
                sequences.append(
                    _Sequence(
                        window,
                        index,
                        place,
                        self._stop_ids(request),
                        shard=int(rows.row_of[place]) // rows_per_shard,
                        shared=int(rows.prefix_length_of[place]),
                        length=int(rows.prefix_length_of[place] + rows.length_of[place]),
                    )
                )
        self._in_rows = _InRows(window, rows, sequences) if sequences else None

    def step(self) -> list[Delta | Answer]:
        """Prefills and seats what there is room for, dispatches one call of `decode`, and reads the
        results of the one before."""
        self._prefill()
        self._seat()
        return list(self._read(unread=1 if self._decode() else 0))

    def cancel(self, key: int) -> Answer | None:
        """Ends the request of this key and frees its pages; None if it is not here."""
        for sequence in self._sequences():
            if sequence.request.key == key:
                self._cancel(sequence)
                return sequence.answer()
        return None

    def cancel_all(self) -> None:
        """Ends all requests."""
        for sequence in list(self._sequences()):
            self._cancel(sequence)

    def _cancel(self, sequence: "_Sequence") -> None:
        sequence.cancelled = True
        self._leave(sequence)

    def _sequences(self) -> Iterator["_Sequence"]:
        """All that have not ended."""
        in_rows = self._in_rows.sequences if self._in_rows else []
        unseated = [each for group in self._unseated for each in group.sequences]
        chunks = [each for chunk in self._unread for each in chunk.sequences]
        everywhere = [*self._occupant, *in_rows, *unseated, *chunks]
        yield from dict.fromkeys(each for each in everywhere if each and not each.done)

    def _stop_ids(self, request: Request) -> tuple[int, ...]:
        chosen = request.sampling.stop_ids
        return self.model.config.eos_token_ids if chosen is None else chosen

    def _prefill(self) -> None:
        """Prefills the rows as soon as the prompts of all of their sequences find pages.

        Where nothing runs that could give back any, those whose prompts do are prefilled, and the
        rows again later for the others.
        """
        if self._in_rows is None or self._unseated:
            return
        window, rows, sequences = self._in_rows
        sequences = [sequence for sequence in sequences if not sequence.done]
        admitted = self._admitted(rows, sequences)
        if len(admitted) < len(sequences) and (any(self._occupant) or self._unread):
            return
        left = [sequence for sequence in sequences if sequence not in admitted]
        self._in_rows = _InRows(window, rows, left) if left else None
        if not admitted:
            return
        prompts = PromptPages(rows, self.pools, self.shapes.page_size)
        for sequence in admitted:
            if sequence.limit > 1:
                sequence.pages = prompts.take(sequence.place, sequence.shard)
        model = self.model
        hidden, self.pages = programs.prefill(
            model.graphdef,
            model.state,
            self.pages,
            window.pool,
            model.put_rows(rows, self._drops),
            model.put(prompts.places),
            max_segment_length=self.shapes.longest_prompt,
            drops=self._drops,
        )
        for source, target in prompts.copies(self.shapes.slots * self.shapes.page_size):
            self.pages = programs.copy_in_pages(
                self.pages,
                model.put(source),
                model.put(target),
                num_layers=model.config.text.num_layers,
            )
        for begin in range(0, len(admitted), self.shapes.slots):
            group = admitted[begin : begin + self.shapes.slots]
            segments = _device_segments(rows, group, self.shapes.slots)
            first = programs.first_tokens(model.graphdef, model.state, hidden, segments)
            self._unread.append(_Chunk(first[None], list(group)))
            # A sequence of one token is complete with its first token and needs no slot.
            waiting = {i: each for i, each in enumerate(group) if each.limit > 1}
            self._unseated.append(_Unseated(segments, first, waiting))

    def _admitted(self, rows: packing.Rows, sequences: list["_Sequence"]) -> list["_Sequence"]:
        """The first sequences of each shard that can have pages for their prompts now."""
        admitted = []
        for shard, pool in enumerate(self.pools):
            running = [self._claim(each) for each in self._occupant if each and each.shard == shard]
            waiting: list[Claim] = []
            free = pool.free
            prefixes: set[tuple[int, int]] = set()
            for sequence in sequences:
                if sequence.shard != shard:
                    continue
                if sequence.limit > 1:
                    now, later = self._pages(sequence.length), self._pages(sequence.final_length)
                    # Its readers may end in any order: what they share counts as never given back.
                    shared = sequence.shared // self.shapes.page_size
                    waiting.append(Claim(now - shared, later - now))
                    prefix = rows.prefix_of(sequence.place)
                    free -= now if prefix not in prefixes else now - shared
                    prefixes.add(prefix)
                if free < 0 or not can_finish(free, running, waiting):
                    break
                admitted.append(sequence)
        return sorted(admitted, key=lambda sequence: sequence.place)

    def _seat(self) -> None:
        """Gives free slots to sequences that have been prefilled."""
        per_shard = self.shapes.slots // self.model.shards
        while self._unseated:
            group = self._unseated[0]
            slot_of = np.full(self.shapes.slots, -1, np.int32)
            for index, sequence in list(group.waiting.items()):
                slots = range(sequence.shard * per_shard, (sequence.shard + 1) * per_shard)
                slot = next((slot for slot in slots if self._occupant[slot] is None), None)
                # A first token that was read in the meantime may have been the last one too.
                if sequence.done or slot is not None:
                    del group.waiting[index]
                if not sequence.done and slot is not None:
                    slot_of[index] = slot
                    self._occupant[slot] = sequence
            if (slot_of >= 0).any():
                self.slots = programs.seat(
                    self.slots, group.segments, group.first, jnp.asarray(slot_of)
                )
            if group.waiting:
                return
            self._unseated.popleft()

    def _decode(self) -> bool:
        """Dispatches one call of `decode`, unless no slot has steps left."""
        active = np.zeros(self.shapes.slots, bool)
        tables = np.zeros((self.shapes.slots, self.shapes.table_width), np.int32)
        for slot, sequence in enumerate(self._occupant):
            if sequence is not None and sequence.length < sequence.final_length:
                active[slot] = self._grow(sequence)
                tables[slot, : len(sequence.pages)] = sequence.pages
        if not active.any():
            return False
        model = self.model
        self.slots, self.pages, emitted = programs.decode(
            model.graphdef,
            model.state,
            self.slots,
            self.pages,
            model.put(tables),
            model.put(active),
            steps=self.shapes.decode_steps_per_call,
        )
        sequences = [each if active[slot] else None for slot, each in enumerate(self._occupant)]
        self._unread.append(_Chunk(emitted, sequences))
        return True

    def _grow(self, sequence: "_Sequence") -> bool:
        """Gives a sequence the pages of its next steps; False if it has to wait for them."""
        target = min(sequence.length + self.shapes.decode_steps_per_call, sequence.final_length)
        more = self._pages(target) - len(sequence.pages)
        if more > 0:
            pool, shard = self.pools[sequence.shard], sequence.shard
            if more > pool.free:
                return False
            others = [each for each in self._occupant if each and each is not sequence]
            held, needed = self._claim(sequence)
            running = [self._claim(each) for each in others if each.shard == shard]
            waiting = [
                self._claim(each)
                for group in self._unseated
                for each in group.sequences
                if each.shard == shard
            ]
            running.append(Claim(held + more, needed - more))
            if not can_finish(pool.free - more, running, waiting):
                return False
            sequence.pages += pool.take(more)
        sequence.length = target
        return True

    def _claim(self, sequence: "_Sequence") -> Claim:
        held = self.pools[sequence.shard].only_reader(sequence.pages)
        return Claim(held, self._pages(sequence.final_length) - len(sequence.pages))

    def _pages(self, tokens: int) -> int:
        return -(-tokens // self.shapes.page_size)

    def _read(self, unread: int) -> Iterator[Delta | Answer]:
        """Reads calls until only `unread` are left."""
        while len(self._unread) > unread:
            chunk = self._unread.popleft()
            for column, sequence in zip(np.asarray(chunk.tokens).T, chunk.sequences, strict=False):
                if sequence is None or sequence.done:
                    continue
                delta = sequence.extend(column[column >= 0].tolist())
                if delta.token_ids:
                    yield delta
                if sequence.done:
                    self._leave(sequence)
                    yield sequence.answer()

    def _leave(self, sequence: "_Sequence") -> None:
        """Frees what a sequence has had."""
        if sequence in self._occupant:
            self._occupant[self._occupant.index(sequence)] = None
        self.pools[sequence.shard].release(sequence.pages)
        sequence.pages = []


@dataclasses.dataclass(eq=False)
class _Sequence:
    """A request being decoded.

    Attributes:
      window, index: the request's place in its window.
      place: its number in its batch of rows.
      stop_ids: tokens that end it.
      shard: the data shard of its row, and so of its pages and its slot.
      shared: tokens of the prompt that others of its row have in common with it.
      length: tokens in pages when everything dispatched has run, unless it ends before.
      pages: its pages in order; none before the prefill.
      tokens: generated tokens that have been read.
      cancelled: whether nobody waits for it any more.
    """

    window: Window
    index: int
    place: int
    stop_ids: tuple[int, ...]
    shard: int
    shared: int
    length: int
    pages: list[int] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    cancelled: bool = False

    def __post_init__(self) -> None:
        # The last token is never put into a page.
        self.final_length = self.length + self.limit - 1

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
        return self.cancelled or self.stopped or len(self.tokens) >= self.limit

    def extend(self, tokens: list[int]) -> Delta:
        """Appends tokens; the delta has them without the stop id."""
        self.tokens += tokens
        return Delta(self.request.key, tuple(tokens[:-1] if self.stopped else tokens))

    def answer(self) -> Answer:
        tokens = tuple(self.tokens[:-1] if self.stopped else self.tokens)
        usage = self.window.usage(self.index, len(tokens))
        reason: FinishReason = "stop" if self.stopped else "length"
        if self.cancelled:
            reason = "cancelled"
        return Answer(self.request.key, tokens, float("nan"), reason, usage)


class _InRows(NamedTuple):
    """A batch of rows, and those of its sequences that have not been prefilled."""

    window: Window
    rows: packing.Rows
    sequences: list[_Sequence]


class _Unseated(NamedTuple):
    """Segments that have been prefilled, their first tokens, and by their number the sequences
    that wait for a slot."""

    segments: programs.Segments
    first: jax.Array
    waiting: dict[int, _Sequence]

    @property
    def sequences(self) -> Iterable[_Sequence]:
        return self.waiting.values()


class _Chunk(NamedTuple):
    """Tokens [steps, columns] on the device, and whose each column is."""

    tokens: jax.Array
    sequences: list[_Sequence | None]


def _device_segments(
    rows: packing.Rows, sequences: Sequence[_Sequence], size: int
) -> programs.Segments:
    """Sequences of these rows, padded to `size`."""

    def padded(values: Sequence[float] | np.ndarray, dtype: np.typing.DTypeLike) -> jax.Array:
        column = np.zeros(size, dtype)
        column[: len(values)] = values
        return jnp.asarray(column)

    at = [sequence.place for sequence in sequences]
    row, last = rows.row_of[at], rows.start_of[at] + rows.length_of[at] - 1
    params = [sequence.request.sampling for sequence in sequences]
    stop_ids = np.full((size, MAX_STOP_IDS), -1, np.int32)
    for ids, sequence in zip(stop_ids, sequences, strict=False):
        ids[: len(sequence.stop_ids)] = sequence.stop_ids
    sampling = Sampling(
        temperature=padded([each.temperature for each in params], np.float32),
        top_p=padded([each.top_p for each in params], np.float32),
        seed=padded([each.seed for each in params], np.uint32),
        stop_ids=jnp.asarray(stop_ids),
    )
    return programs.Segments(
        padded(row, np.int32),
        padded(last, np.int32),
        padded(rows.length_of[at] + rows.prefix_length_of[at], np.int32),
        padded(rows.positions[row, last] + 1, np.int32),
        padded([each.max_new_tokens for each in params], np.int32),
        sampling,
    )
