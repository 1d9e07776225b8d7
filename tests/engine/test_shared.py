"""One engine for several reductions: each request's answer is that of an engine of its own."""

import dataclasses

import jax
import pytest

from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.request import Answer
from prumerge_jax.engine.shared import SharedEngine
from prumerge_jax.models.llava import LlavaModel
from tests.engine.test_engine import (
    CONFIG,
    SMALL,
    by_key,
    make_engine,
    make_requests,
    random_llava,
    tokens_of,
    with_sampling,
)

NAMES = ("prumerge", "full", "prumerge+")
SHAPES = dataclasses.replace(
    SMALL,
    prefill_rows=1,
    row_length=128,
    short_rows=(32, 64, 128),
    pool_capacity=20,
)


@pytest.fixture(scope="module")
def model() -> LlavaModel:
    return random_llava(CONFIG, gain=4)


def engines(model: LlavaModel) -> dict[str, Engine]:
    return {name: make_engine(model, SHAPES, name) for name in NAMES}


@pytest.mark.slow
def test_answers_are_those_of_engines_apart_and_nothing_compiles(
    model: LlavaModel,
) -> None:
    requests = with_sampling(make_requests(40, max_new_tokens=5), temperature=0.7, seed=3)
    apart: dict[int, tuple[int, ...]] = {}
    for number, name in enumerate(NAMES):
        alone = make_engine(model, reduction=name)
        apart |= tokens_of(by_key(alone.generate(requests[number::3])))
    assert len(set(apart.values())) > 10
    shared = SharedEngine(engines(model))
    shared.warm_up()
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        heard := lambda event, *_, **__: compiled.append(event)
    )
    answers: list[Answer] = []
    waiting = [
        dataclasses.replace(request, reduction=NAMES[request.key % 3]) for request in requests
    ]
    for step in range(400):
        for request in waiting[: 1 + step % 4]:
            shared.submit(request)
        del waiting[: 1 + step % 4]
        answers += [event for event in shared.step() if isinstance(event, Answer)]
        if not waiting and not shared.core.is_busy:
            break
    jax.monitoring.unregister_event_duration_listener(heard)
    assert not any("backend_compile" in event for event in compiled)
    assert tokens_of(by_key(answers)) == apart
    assert shared.core.decoder is not None
    assert shared.core.decoder.taken_pages == 0
    # Rows are cut: most of these short ones are not full.
    assert shared.counters.row_tokens < 128 * 40


def test_a_request_is_cancelled_wherever_it_is(model: LlavaModel) -> None:
    shared = SharedEngine(engines(model))
    for request in make_requests(9, max_new_tokens=5):
        shared.submit(dataclasses.replace(request, reduction=NAMES[request.key % 3]))
    shared.cancel(8)
    answers = shared.step()
    for key in (0, 4):
        shared.cancel(key)
    while shared.core.is_busy:
        answers += shared.step()
    reasons = {each.key: each.finish_reason for each in answers if isinstance(each, Answer)}
    assert {key for key, reason in reasons.items() if reason == "cancelled"} == {0, 4, 8}
    assert len(reasons) == 9
    assert shared.core.decoder is not None
    assert shared.core.decoder.taken_pages == 0


def test_what_cannot_be_shared_is_refused(model: LlavaModel) -> None:
    (request,) = make_requests(1, max_new_tokens=5)
    with pytest.raises(ValueError, match="request 0 is of reduction None; expected one of"):
        SharedEngine(engines(model)).submit(request)
    other = make_engine(model, dataclasses.replace(SHAPES, slots=4))
    with pytest.raises(ValueError, match="engines of different shapes"):
        SharedEngine({"full": make_engine(model, SHAPES, "full"), "prumerge": other})
