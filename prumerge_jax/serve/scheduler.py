"""The thread that owns the device: requests in, tokens out, for every engine in turn.

The HTTP side speaks to it through an inbox and hears from it by callbacks; it touches no engine.
Reductions that can share an engine do, and all share the weights. An engine whose step fails is
replaced, and the requests that were in it run again: their draws depend on their seeds alone, so
they yield the same tokens, and those that were delivered are skipped.
"""

import collections
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

from prumerge_jax.engine.request import Answer, Delta, Request

_LOG = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Failed steps after which a request is given up: the first time it runs again with the others,
the second time alone, which tells the one that is at fault."""
UNHEALTHY_FAILURES = 3
"""Failed steps in a row after which the server says that it is not well."""
STALLED_SECONDS = 60.0
"""Time without a finished step after which the server says that it is not well."""


class Core(Protocol):
    """What the scheduler asks of an engine."""

    def submit(self, request: Request) -> None:
        """Queues a request."""

    def step(self) -> list[Delta | Answer]:
        """Runs a little, and returns what came of it."""

    def cancel(self, key: int) -> None:
        """Ends a request; its answer follows from a later step."""


class Tokens(NamedTuple):
    """Tokens of an answer, without the stop id."""

    token_ids: tuple[int, ...]


class Failed(NamedTuple):
    """A request that gets no answer: why, and whether the request is at fault."""

    reason: str
    is_refusal: bool


Event = Tokens | Answer | Failed


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request on its way; after `submit` the scheduler's thread alone touches it.

    Attributes:
      lane: name of the engine.
      request: its key is the ticket's.
      deliver: called on the scheduler's thread with every event.
      delivered, seen: numbers of tokens that were delivered, and that its present run has yielded;
        a second run yields first what was delivered before.
      started: when it was first handed to the engine, of `time.monotonic`; 0 before.
      failures: failed steps while it was in the engine.
      cancelled: nobody waits for it any more.
    """

    lane: str
    request: Request
    deliver: Callable[[Event], None]
    delivered: int = 0
    seen: int = 0
    started: float = 0.0
    failures: int = 0
    cancelled: bool = False

    @property
    def key(self) -> int:
        """Names the request."""
        return self.request.key

    def take(self, event: Delta | Answer) -> None:
        """Delivers what is new of an engine's event."""
        begin = 0 if isinstance(event, Answer) else self.seen
        new = event.token_ids[max(0, self.delivered - begin) :]
        self.seen = begin + len(event.token_ids)
        if new:
            self.delivered += len(new)
            self.deliver(Tokens(new))
        if isinstance(event, Answer):
            self.deliver(event)


class _Cancel(NamedTuple):
    ticket: Ticket


class _Call(NamedTuple):
    function: Callable[[], Any]
    future: Future[Any]


class _Wake(NamedTuple):
    """Nothing but the end of waiting."""


class _Lane:
    """An engine, the requests in it, and those that wait for room.

    Attributes:
      running: requests in the engine, by key.
      waiting: requests that are not, in the order of their arrival.
      suspects: requests that were in the engine at two failures; they run alone.
    """

    def __init__(self, make_core: Callable[[], Core], capacity: int) -> None:
        self._make_core, self._capacity = make_core, capacity
        self._core: Core | None = None
        self.running: dict[int, Ticket] = {}
        self.waiting: collections.deque[Ticket] = collections.deque()
        self.suspects: collections.deque[Ticket] = collections.deque()
        self._ending: list[int] = []

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting or self.suspects)

    def cancel(self, ticket: Ticket) -> None:
        ticket.cancelled = True
        if ticket.key in self.running:
            self._ending.append(ticket.key)
            return
        for line in (self.waiting, self.suspects):
            with contextlib.suppress(ValueError):
                line.remove(ticket)

    def core(self) -> Core:
        """The engine; after a failure a new one."""
        if self._core is None:
            self._core = self._make_core()
        return self._core

    def step(self) -> bool:
        """Fills the engine, runs a step and delivers its events; says whether there were any."""
        admitted = self._admit()
        core = self.core()
        for ticket in admitted:
            ticket.seen, ticket.started = 0, ticket.started or time.monotonic()
            try:
                core.submit(ticket.request)
            except ValueError as error:
                del self.running[ticket.key]
                ticket.deliver(Failed(str(error), is_refusal=True))
        for key in self._ending:
            if key in self.running:
                core.cancel(key)
        self._ending.clear()
        events = core.step() if self.running else []
        for event in events:
            ticket = self.running[event.key]
            if isinstance(event, Answer):
                del self.running[event.key]
            ticket.take(event)
        return bool(events)

    def fail(self) -> None:
        """Drops the engine; what was in it runs again, unless it was there too often."""
        self._core = None
        self._ending.clear()
        tickets = [ticket for ticket in self.running.values() if not ticket.cancelled]
        self.running.clear()
        again = []
        for ticket in tickets:
            ticket.failures += 1
            if ticket.failures >= MAX_FAILURES:
                ticket.deliver(Failed("the engine failed while it answered", is_refusal=False))
            elif ticket.failures == MAX_FAILURES - 1:
                self.suspects.append(ticket)
            else:
                again.append(ticket)
        self.waiting.extendleft(reversed(again))

    def _admit(self) -> list[Ticket]:
        """Moves requests from the lines into the running ones, as far as there is room."""
        admitted: list[Ticket] = []
        if self.suspects:
            if not self.running:
                admitted.append(self.suspects.popleft())
        elif not any(ticket.failures == MAX_FAILURES - 1 for ticket in self.running.values()):
            room = self._capacity - len(self.running)
            admitted += [self.waiting.popleft() for _ in range(min(room, len(self.waiting)))]
        self.running |= {ticket.key: ticket for ticket in admitted}
        return admitted


class Scheduler:
    """Runs requests on a thread of its own.

    Args:
      make_core: makes each engine, everything compiled.
      capacity: requests in one engine; more wait in front of it, where a failed step does not
        reach them.
      placed: the context in which engines run.
      prepare: called on the thread after the engines were made.

    Attributes:
      started: ends when every engine is ready, or with the reason why one cannot be.
    """

    def __init__(
        self,
        make_core: Mapping[str, Callable[[], Core]],
        capacity: int,
        *,
        placed: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self._lanes = {name: _Lane(make, capacity) for name, make in make_core.items()}
        self._placed, self._prepare = placed, prepare
        self._inbox: queue.SimpleQueue[Ticket | _Cancel | _Call | _Wake] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)
        self.started: Future[None] = Future()
        self._ending = threading.Event()
        self._failures = 0
        self._last_event = time.monotonic()

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, ticket: Ticket) -> None:
        """Queues a request."""
        self._inbox.put(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Ends a request; one that was running still gets its answer."""
        self._inbox.put(_Cancel(ticket))

    def call(self, function: Callable[[], Any]) -> Future[Any]:
        """Runs a function on the thread between two steps."""
        future: Future[Any] = Future()
        self._inbox.put(_Call(function, future))
        return future

    def stop(self, timeout_s: float = 60.0) -> None:
        """Ends the thread after the step that is running, whatever is unfinished."""
        self._ending.set()
        self._inbox.put(_Wake())
        self._thread.join(timeout_s)

    def in_flight(self) -> tuple[int, int]:
        """Numbers of requests that are running and that wait."""
        lanes = self._lanes.values()
        running = sum(len(lane.running) for lane in lanes)
        return running, sum(len(lane.waiting) + len(lane.suspects) for lane in lanes)

    def unhealthy(self) -> str | None:
        """Why no request should be sent here; None where one may."""
        if not self.started.done():
            return "the engines are being prepared"
        if self.started.exception() is not None or not self._thread.is_alive():
            return "the thread that owns the device has ended"
        if self._failures >= UNHEALTHY_FAILURES:
            return f"{self._failures} steps in a row failed"
        silent = time.monotonic() - self._last_event
        if silent > STALLED_SECONDS and any(self.in_flight()):
            return f"no token for {silent:.0f} s"
        return None

    def _run(self) -> None:
        with self._placed():
            try:
                for lane in self._lanes.values():
                    lane.core()
                self._prepare()
            except BaseException as error:
                self.started.set_exception(error)
                return
            self.started.set_result(None)
            while not self._ending.is_set():
                busy = [lane for lane in self._lanes.values() if lane.has_work]
                self._read_inbox(wait=not busy)
                for lane in busy:
                    self._step(lane)

    def _read_inbox(self, wait: bool) -> None:
        """Takes everything that has come, and where `wait` is set at least one."""
        with contextlib.suppress(queue.Empty):
            while True:
                message = self._inbox.get(block=wait)
                if wait:
                    self._last_event = time.monotonic()
                wait = False
                match message:
                    case Ticket():
                        self._lanes[message.lane].waiting.append(message)
                    case _Cancel(ticket):
                        self._lanes[ticket.lane].cancel(ticket)
                    case _Call(function, future):
                        _answer(function, future)

    def _step(self, lane: _Lane) -> None:
        try:
            if lane.step():
                self._last_event, self._failures = time.monotonic(), 0
        except Exception:  # whatever it is, other requests must not suffer
            self._failures += 1
            _LOG.exception("a step failed; %d in a row", self._failures)
            lane.fail()


def _answer(function: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
