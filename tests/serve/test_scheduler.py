"""The thread that owns the device: order, room, cancelling, and engines that fail."""

import queue
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from prumerge_jax.engine.request import Answer, Request, SamplingParams
from prumerge_jax.serve import scheduler as scheduling
from prumerge_jax.serve.scheduler import Event, Failed, Scheduler, Ticket, Tokens
from tests.serve.fakes import FakeCore, answer_of


class Fixture:
    def __init__(self) -> None:
        self.cores: list[FakeCore] = []
        self.fail: Callable[[list[Request]], None] = lambda running: None
        self.scheduler = Scheduler({"full": self.make, "prumerge": self.make}, capacity=3)

    def make(self) -> FakeCore:
        self.cores.append(FakeCore(lambda running: self.fail(running)))
        return self.cores[-1]

    def ticket(self, key: int, lane: str = "full", tokens: int = 6) -> tuple[Ticket, queue.Queue]:
        events: queue.Queue[Event] = queue.Queue()
        sampling = SamplingParams(max_new_tokens=tokens, seed=key)
        request = Request(key, np.array([1, 5, 7], np.int32), sampling=sampling)
        return Ticket(lane, request, events.put), events


@pytest.fixture
def fixture() -> Iterator[Fixture]:
    fixture = Fixture()
    fixture.scheduler.start()
    yield fixture
    fixture.scheduler.stop()


def read(events: queue.Queue) -> tuple[list[int], Answer | Failed]:
    """The tokens that were delivered, and how it ended."""
    tokens: list[int] = []
    while True:
        event = events.get(timeout=20)
        if not isinstance(event, Tokens):
            return tokens, event
        tokens += event.token_ids


def test_every_request_gets_its_tokens_once(fixture: Fixture) -> None:
    pairs = [fixture.ticket(key, ("full", "prumerge")[key % 2], 1 + key) for key in range(12)]
    for ticket, _ in pairs:
        fixture.scheduler.submit(ticket)
    for ticket, events in pairs:
        tokens, answer = read(events)
        assert isinstance(answer, Answer)
        assert tokens == list(answer.token_ids) == answer_of(ticket.request)
        assert events.empty()
    assert len(fixture.cores) == 2
    assert fixture.scheduler.in_flight() == (0, 0)
    assert fixture.scheduler.unhealthy() is None


def test_no_more_than_the_capacity_is_in_an_engine(fixture: Fixture) -> None:
    most = []
    fixture.fail = lambda running: most.append(len(running))
    pairs = [fixture.ticket(key) for key in range(9)]
    for ticket, _ in pairs:
        fixture.scheduler.submit(ticket)
    for _, events in pairs:
        read(events)
    assert max(most) == 3


def test_a_failed_step_loses_nothing(fixture: Fixture) -> None:
    steps = iter(range(100))

    def fail(running: list[Request]) -> None:
        if next(steps) == 1:
            raise RuntimeError("the device hiccups")

    fixture.fail = fail
    pairs = [fixture.ticket(key) for key in range(5)]
    for ticket, _ in pairs:
        fixture.scheduler.submit(ticket)
    for ticket, events in pairs:
        tokens, answer = read(events)
        assert isinstance(answer, Answer)
        assert tokens == answer_of(ticket.request)  # none twice
    assert len(fixture.cores) == 3
    assert fixture.scheduler.unhealthy() is None


def test_a_request_that_breaks_the_engine_falls_alone(fixture: Fixture) -> None:
    def fail(running: list[Request]) -> None:
        if any(request.key == 1 for request in running):
            raise RuntimeError("poison")

    fixture.fail = fail
    pairs = [fixture.ticket(key) for key in range(6)]
    other = fixture.ticket(50, "prumerge")
    for ticket, _ in [*pairs, other]:
        fixture.scheduler.submit(ticket)
    for ticket, events in [*pairs, other]:
        tokens, end = read(events)
        if ticket.key == 1:
            assert end == Failed("the engine failed while it answered", is_refusal=False)
        else:
            assert isinstance(end, Answer)
            assert tokens == answer_of(ticket.request)
    assert fixture.scheduler.unhealthy() is None


def test_three_failures_in_a_row_are_told_until_a_step_succeeds(fixture: Fixture) -> None:
    def fail(running: list[Request]) -> None:
        raise RuntimeError("dead")

    fixture.fail = fail
    ticket, events = fixture.ticket(0)
    fixture.scheduler.submit(ticket)
    assert isinstance(read(events)[1], Failed)
    time.sleep(0.05)
    assert fixture.scheduler.unhealthy() == "3 steps in a row failed"
    fixture.fail = lambda running: None
    ticket, events = fixture.ticket(1)
    fixture.scheduler.submit(ticket)
    assert isinstance(read(events)[1], Answer)
    assert fixture.scheduler.unhealthy() is None


def test_cancelled_in_the_engine_and_before(fixture: Fixture) -> None:
    pairs = [fixture.ticket(key, tokens=100_000) for key in range(4)]
    for ticket, _ in pairs:
        fixture.scheduler.submit(ticket)
    pairs[0][1].get(timeout=20)
    fixture.scheduler.cancel(pairs[3][0])  # waits: there is room for three
    for ticket, _ in pairs[:3]:
        fixture.scheduler.cancel(ticket)
    for _, events in pairs[:3]:
        _, answer = read(events)
        assert isinstance(answer, Answer)
        assert answer.finish_reason == "cancelled"
    fixture.scheduler.call(lambda: None).result(timeout=20)
    assert fixture.scheduler.in_flight() == (0, 0)
    assert pairs[3][1].empty()
    assert fixture.cores[0].cancelled == {0, 1, 2}


def test_a_request_that_the_engine_refuses(fixture: Fixture) -> None:
    ticket, events = fixture.ticket(0, tokens=13)
    fixture.scheduler.submit(ticket)
    assert read(events)[1] == Failed("13 tokens bring no luck", is_refusal=True)


def test_calls_run_on_the_thread_and_their_errors_come_back(fixture: Fixture) -> None:
    assert fixture.scheduler.call(lambda: 6 * 7).result(timeout=20) == 42
    with pytest.raises(ZeroDivisionError):
        fixture.scheduler.call(lambda: 1 // 0).result(timeout=20)


def test_an_engine_that_stalls_is_told(fixture: Fixture, monkeypatch) -> None:
    monkeypatch.setattr(scheduling, "STALLED_SECONDS", 0.05)
    fixture.fail = lambda running: time.sleep(0.5)
    ticket, events = fixture.ticket(0)
    fixture.scheduler.submit(ticket)
    time.sleep(0.3)
    assert fixture.scheduler.unhealthy() == "no token for 0 s"
    read(events)


def test_an_engine_that_cannot_be_made() -> None:
    def make() -> FakeCore:
        raise RuntimeError("out of memory")

    scheduler = Scheduler({"full": make}, 1)
    assert scheduler.unhealthy() == "the engines are being prepared"
    scheduler.start()
    assert isinstance(scheduler.started.exception(timeout=20), RuntimeError)
    assert scheduler.unhealthy() == "the thread that owns the device has ended"
