"""The core under a server: requests come and go at any time, and pages with them."""

import dataclasses

import jax
import numpy as np
import pytest

from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.request import Answer, Delta, Request, SamplingParams
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


@pytest.fixture(scope="module")
def model() -> LlavaModel:
    return random_llava(CONFIG, gain=4)


def free_pages(engine: Engine) -> int:
    assert engine.core.decoder is not None
    return sum(pool.free for pool in engine.core.decoder.pools)


def run(engine: Engine) -> tuple[dict[int, Answer], dict[int, list[int]]]:
    """Steps until nothing is left: answers, and tokens by key as they were streamed."""
    answers: dict[int, Answer] = {}
    streamed: dict[int, list[int]] = {}
    while engine.core.is_busy:
        for event in engine.step():
            if isinstance(event, Delta):
                streamed.setdefault(event.key, []).extend(event.token_ids)
            else:
                assert event.key not in answers
                answers[event.key] = event
    return answers, streamed


def test_requests_that_come_one_by_one_are_answered_as_together(model: LlavaModel) -> None:
    requests = make_requests(9, seed=1, max_new_tokens=8)
    scored = [dataclasses.replace(r, key=100 + r.key) for r in make_requests(5, seed=2)]
    expected = by_key(make_engine(model).generate(requests))
    scores = by_key(make_engine(model).score(scored))
    engine = make_engine(model)
    answers: dict[int, Answer] = {}
    waiting = [*requests[:5], *scored, *requests[5:]]
    while waiting or engine.core.is_busy:
        if waiting:
            engine.submit(waiting.pop(0))
        answers |= {event.key: event for event in engine.step() if isinstance(event, Answer)}
    assert tokens_of({k: answers[k] for k in expected}) == tokens_of(expected)
    for key, answer in scores.items():
        assert answers[key].log_likelihood == pytest.approx(answer.log_likelihood, abs=1e-4)
    assert free_pages(engine) == engine.shapes.pool_pages


def test_a_lone_request_is_not_held_back(model: LlavaModel) -> None:
    (request,) = make_requests(1, seed=1, max_new_tokens=1)
    engine = make_engine(model, dataclasses.replace(SMALL, window_size=64))
    engine.submit(request)
    assert [event.key for event in engine.step() if isinstance(event, Answer)] == [request.key]


def test_cancelled_requests_free_their_pages_and_disturb_nobody(model: LlavaModel) -> None:
    requests = with_sampling(make_requests(12, seed=1, max_new_tokens=20), stop_ids=())
    expected = tokens_of(by_key(make_engine(model).generate(requests)))
    for steps in (0, 1, 2, 4, 7):
        engine = make_engine(model)
        for request in requests:
            engine.submit(request)
        early: dict[int, Answer] = {}
        for _ in range(steps):
            early |= {event.key: event for event in engine.step() if isinstance(event, Answer)}
        cancelled = [key for key in (0, 1, 4, 9, 11) if key not in early]
        before = free_pages(engine) if engine.core.decoder else 0
        for key in cancelled:
            engine.cancel(key)
        if engine.core.decoder and any(s for s in engine.core.decoder._occupant):
            assert free_pages(engine) >= before
        answers, _ = run(engine)
        answers |= early
        assert answers.keys() == expected.keys()
        for key, tokens in expected.items():
            if key in cancelled:
                assert answers[key].finish_reason == "cancelled"
                assert answers[key].token_ids == tokens[: len(answers[key].token_ids)]
            else:
                assert answers[key].token_ids == tokens
        assert free_pages(engine) == engine.shapes.pool_pages
        with pytest.raises(ValueError, match="no request with key 0"):
            engine.cancel(0)


def test_keys_are_used_once_at_a_time(model: LlavaModel) -> None:
    (request,) = make_requests(1, seed=1, max_new_tokens=2)
    engine = make_engine(model)
    engine.submit(request)
    with pytest.raises(ValueError, match="a request with key 0 is being answered already"):
        engine.submit(request)
    with pytest.raises(ValueError, match="busy with other requests"):
        list(engine.generate([request]))
    run(engine)
    engine.submit(request)
    assert len(run(engine)[0]) == 1
    with pytest.raises(ValueError, match="request 0: expected a continuation to score"):
        list(engine.score([request]))
    assert not engine.core.is_busy


def test_a_run_that_is_given_up_leaves_nothing_behind(model: LlavaModel) -> None:
    requests = make_requests(9, seed=1, max_new_tokens=8)
    engine = make_engine(model)
    expected = tokens_of(by_key(make_engine(model).generate(requests)))
    answers = engine.generate(requests)
    next(answers)
    answers.close()
    assert free_pages(engine) == engine.shapes.pool_pages
    assert tokens_of(by_key(engine.generate(requests))) == expected


@pytest.mark.parametrize("page_size", [16, 128])
def test_pages_that_others_have_left_are_not_seen(model: LlavaModel, page_size: int) -> None:
    """Every page is NaN before it is given out."""
    shapes = dataclasses.replace(SMALL, page_size=page_size)
    requests = make_requests(9, seed=1, max_new_tokens=8)
    expected = tokens_of(by_key(make_engine(model).generate(requests)))
    engine = make_engine(model, shapes)
    list(engine.generate(requests[:1]))
    decoder = engine.core.decoder
    assert decoder is not None
    decoder.pages = jax.tree.map(lambda x: x * np.nan, decoder.pages)
    assert tokens_of(by_key(engine.generate(requests))) == expected


def text_requests(count: int, seed: int) -> list[Request]:
    """Prompts of 1 to 60 tokens, answers of 1 to 30; many stop before."""
    rng = np.random.default_rng(seed)
    return [
        Request(
            key,
            rng.integers(3, 500, rng.integers(1, 60)).astype(np.int32),
            sampling=SamplingParams(
                max_new_tokens=int(rng.integers(1, 30)),
                stop_ids=tuple(rng.integers(3, 500, 4).tolist()),
            ),
        )
        for key in range(count)
    ]


@pytest.mark.slow
def test_a_pool_for_one_sequence_answers_all(model: LlavaModel) -> None:
    """Prompts wait for pages, and sequences for more of them: no answer is lost or other."""
    shapes = dataclasses.replace(SMALL, slots=4, cache_length=96, page_size=4)
    requests = text_requests(25, seed=3)
    expected = tokens_of(by_key(make_engine(model, shapes).generate(requests)))
    engine = make_engine(model, dataclasses.replace(shapes, pages=24))
    assert tokens_of(by_key(engine.generate(requests))) == expected
    assert free_pages(engine) == 24


@pytest.mark.slow
def test_twenty_thousand_requests_lose_no_page() -> None:
    """Through a pool that is nearly always empty; a page's size of 4 makes for many of them."""
    config = dataclasses.replace(
        CONFIG, text=dataclasses.replace(CONFIG.text, width=8, mlp_width=8, num_layers=1,
                                         num_heads=1, num_kv_heads=1, head_dim=8),
    )  # fmt: skip
    graphdef_model = random_llava(config, gain=4)
    shapes = dataclasses.replace(
        SMALL, window_size=128, batch_size=2, row_length=512, prefill_rows=8, slots=64,
        cache_length=96, page_size=4, pages=400, decode_steps_per_call=8,
    )  # fmt: skip
    engine = make_engine(graphdef_model, shapes)
    engine = Engine(
        dataclasses.replace(engine.model, config=config), engine.reduction, engine.shapes
    )
    requests = text_requests(20_000, seed=4)
    seen = 0
    for answer in engine.generate(requests):
        seen += 1
        assert answer.finish_reason in ("stop", "length")
    assert seen == len(requests)
    assert free_pages(engine) == engine.shapes.pool_pages
