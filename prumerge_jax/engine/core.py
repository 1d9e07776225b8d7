"""The core of the engine: requests are submitted at any time, and every step answers some.

Requests wait in a queue until a window is formed of them. A window is closed when it is full, or
with what there is as soon as a slot would stay free without it: a lone request is never held back.
"""

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

from prumerge_jax.data import packing
from prumerge_jax.engine.decoding import SlotDecoder
from prumerge_jax.engine.encoding import PlacedModel
from prumerge_jax.engine.request import Answer, Delta, Request, Usage
from prumerge_jax.engine.scoring import Scores, dispatch_scores
from prumerge_jax.engine.shapes import EngineShapes
from prumerge_jax.engine.windows import Counters, Window, WindowPlanner, window_end
from prumerge_jax.reductions import Drops

MakePlanner = Callable[[], WindowPlanner]


class Core:
    """Requests on their way through one engine.

    Attributes:
      decoder: slots and pages; created with the first request that generates.
    """

    def __init__(
        self,
        model: PlacedModel,
        shapes: EngineShapes,
        planners: Mapping[str | None, MakePlanner],
        counters: Counters,
        *,
        key_bias: bool = False,
        drops: Drops | None = None,
    ) -> None:
        """Prepares a core.

        Args:
          model, shapes: what runs.
          planners: make planners for requests of each `Request.reduction`.
          counters: what has been computed.
          key_bias: whether keys have a bias.
          drops: which tokens leave the decoder.
        """
        self.model, self.shapes, self.counters = model, shapes, counters
        self.decoder: SlotDecoder | None = None
        self._planners, self._key_bias, self._drops = planners, key_bias, drops
        self.reset()

    def reset(self) -> None:
        """Forgets every request, without answers."""
        if self.decoder is not None:
            self.decoder.cancel_all()
        self._to_generate = _Lanes(self._planners, self.shapes.window_size)
        self._to_score = _Lanes(self._planners, self.shapes.window_size)
        self._scores: collections.deque[Scores] = collections.deque()
        self._text_tokens: dict[int, int] = {}
        self._dropped: set[int] = set()
        self._ready: list[Delta | Answer] = []

    @property
    def is_busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._text_tokens or self._ready or self._dropped)

    @property
    def has_room(self) -> bool:
        """Whether another request helps to fill the next windows."""
        return self._to_generate.has_room and self._to_score.has_room

    def submit(self, request: Request) -> None:
        """Takes a request: to score if it has a continuation, else to generate from.

        Raises:
          ValueError: a request of the same key has not left yet, or of a reduction that is not
            this engine's.
        """
        if request.reduction not in self._planners:
            raise ValueError(
                f"request {request.key} is of reduction {request.reduction!r}; expected one of "
                f"{[*self._planners]}"
            )
        if request.key in self._text_tokens or request.key in self._dropped:
            raise ValueError(f"a request with key {request.key} is being answered already")
        self._text_tokens[request.key] = request.text_tokens
        lanes = self._to_score if len(request.continuation) else self._to_generate
        lanes.add(request)

    def cancel(self, key: int) -> None:
        """Ends a request; what it held is free at once, and its answer is among the next ones.

        Raises:
          ValueError: no request of this key waits for its answer.
        """
        if key not in self._text_tokens:
            raise ValueError(f"no request with key {key} is being answered")
        answer = self.decoder.cancel(key) if self.decoder is not None else None
        if answer is None:
            usage = Usage(0, self._text_tokens[key], 0)
            answer = Answer(key, (), float("nan"), "cancelled", usage)
            if not (self._to_generate.remove(key) or self._to_score.remove(key)):
                self._dropped.add(key)  # it is in a window, and comes out of it later
        del self._text_tokens[key]
        self._ready.append(answer)

    def step(self) -> list[Delta | Answer]:
        """Dispatches the next piece of work of each kind, and returns what an earlier one gave."""
        self._score()
        self._generate()
        events, self._ready = self._ready, []
        return events

    def _generate(self) -> None:
        while self.decoder is None or self.decoder.wants_rows:
            failed, rows = self._to_generate.next_rows()
            self._hand_out(failed)
            if rows is None:
                break
            if self.decoder is None:
                self.decoder = SlotDecoder(
                    self.model, self.shapes, key_bias=self._key_bias, drops=self._drops
                )
            self.decoder.take(*rows, dropped=self._dropped)
            self._dropped -= {rows[0].requests[index].key for index in rows[1].requests}
        if self.decoder is not None:
            self._hand_out(self.decoder.step())

    def _score(self) -> None:
        failed, rows = self._to_score.next_rows()
        self._hand_out(failed)
        if rows is not None:
            longest = self.shapes.longest_prompt
            scores = dispatch_scores(self.model, *rows, longest_prompt=longest, drops=self._drops)
            self._scores.append(scores)
        if len(self._scores) > (rows is not None):
            self._hand_out(self._scores.popleft().answers())

    def _hand_out(self, events: Iterable[Delta | Answer]) -> None:
        for event in events:
            if event.key in self._dropped:
                self._dropped.discard(event.key)
                continue
            if isinstance(event, Answer):
                del self._text_tokens[event.key]
                self.counters.requests += event.error is None
            self._ready.append(event)


class _Lanes:
    """Requests of one kind, by reduction. Their rows come in turns."""

    def __init__(self, planners: Mapping[str | None, MakePlanner], window_size: int) -> None:
        self._lanes = {name: _Lane(make, window_size) for name, make in planners.items()}

    @property
    def has_room(self) -> bool:
        """Whether another request helps to fill the next windows."""
        return all(lane.has_room for lane in self._lanes.values())

    def add(self, request: Request) -> None:
        """Queues a request."""
        self._lanes[request.reduction].queue.append(request)

    def remove(self, key: int) -> bool:
        """Takes a request out of its queue; False if it is not there."""
        return any(lane.remove(key) for lane in self._lanes.values())

    def next_rows(self) -> tuple[list[Answer], tuple[Window, packing.Rows] | None]:
        """The next batch of rows with its window, if there are any, and answers of requests that
        cannot run."""
        failed: list[Answer] = []
        for name, lane in list(self._lanes.items()):
            refused, rows = lane.next_rows()
            failed += refused
            if rows is not None:
                self._lanes[name] = self._lanes.pop(name)  # it comes last the next time
                return failed, rows
        return failed, None


class _Lane:
    """Requests of one kind and reduction, from their queue to packed rows."""

    def __init__(self, make_planner: MakePlanner, window_size: int) -> None:
        self.queue: collections.deque[Request] = collections.deque()
        self._make_planner, self._window_size = make_planner, window_size
        self._windows: Iterator[Window] | None = None
        self._rows: collections.deque[tuple[Window, packing.Rows]] = collections.deque()

    @property
    def has_room(self) -> bool:
        """Whether the queue does not hold more than will be taken next: a window, or two to begin
        with, since the planner encodes one ahead."""
        return len(self.queue) <= self._window_size * (2 if self._windows is None else 1)

    def remove(self, key: int) -> bool:
        """Takes a request out of the queue; False if it is not there."""
        for request in self.queue:
            if request.key == key:
                self.queue.remove(request)
                return True
        return False

    def next_rows(self) -> tuple[list[Answer], tuple[Window, packing.Rows] | None]:
        """The next batch of rows with its window, if there are any, and answers of requests that
        cannot run."""
        failed: list[Answer] = []
        while not self._rows and (self._windows is not None or self.queue):
            if self._windows is None:
                self._windows = self._make_planner().windows(self._batches())
            window = next(self._windows, None)
            if window is None:
                self._windows = None
                continue
            failed += window.failed
            self._rows.extend((window, rows) for rows in window.batches)
        return failed, self._rows.popleft() if self._rows else None

    def _batches(self) -> Iterator[list[Request]]:
        """The requests of one window after the other, until the queue is empty."""
        while self.queue:
            size = len(self.queue)
            if size > self._window_size:
                size = window_end(list(itertools.islice(self.queue, self._window_size + 1)))
            yield [self.queue.popleft() for _ in range(size)]
