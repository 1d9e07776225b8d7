"""Requests that share prefixes, against the same requests apart."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

from prumerge_jax import sharding
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.request import Answer, ImageInput, Request, SamplingParams
from prumerge_jax.engine.windows import window_end
from prumerge_jax.models import tuning
from prumerge_jax.models.llava import LlavaModel
from prumerge_jax.models.tuning import Tuning
from tests.conftest import require_eight_devices
from tests.engine.test_engine import (
    SMALL,
    by_key,
    make_engine,
    make_requests,
    model,
    plain,
    sharded_engine,
    tokens_of,
)

__all__ = ["model", "plain"]  # fixtures

SHARING = dataclasses.replace(SMALL, window_size=16)
APART = dataclasses.replace(SHARING, share_prefixes=False)


def conversations(
    count: int, *, seed: int = 0, scored: bool = False, most_new_tokens: int = 6
) -> list[Request]:
    """Requests about few images and without any, that begin with one system text: several
    questions about an image, several continuations of a prompt, equal prompts, sampled ones."""
    rng = np.random.default_rng(seed)
    system = rng.integers(3, 500, 8)
    images = [
        ImageInput(rng.integers(0, 256, (1, 56, 56, 3)).astype(np.uint8), key=f"image {number}")
        for number in range(1 + count // 5)
    ]
    requests: list[Request] = []
    while len(requests) < count:
        image = images[rng.integers(len(images))]
        text = rng.integers(3, 500, rng.integers(1, 9))
        with_image = rng.random() < 0.8
        token_ids = np.concatenate([system, [IMAGE_TOKEN] * with_image, text]).astype(np.int32)
        for _ in range(int(rng.integers(1, 4))):
            continuation = rng.integers(3, 500, rng.integers(1, 4) if scored else 0)
            sampling = SamplingParams(
                temperature=float(rng.integers(2)),
                max_new_tokens=int(rng.integers(1, most_new_tokens + 1)),
                seed=int(rng.integers(100)),
            )
            requests.append(
                Request(
                    len(requests), token_ids, (image,) * with_image,
                    continuation.astype(np.int32), sampling,
                )
            )  # fmt: skip
    return requests[:count]


def assert_equal(sharing: Engine, apart: Engine, requests: list[Request], scored: bool) -> None:
    """Scores within 1e-4, tokens identical; and something was shared."""
    run = Engine.score if scored else Engine.generate
    got, expected = by_key(run(sharing, requests)), by_key(run(apart, requests))
    assert got.keys() == expected.keys()
    for key, answer in got.items():
        assert answer.usage == expected[key].usage
        if scored:
            value = pytest.approx(expected[key].log_likelihood, rel=1e-5, abs=1e-4)
            assert answer.log_likelihood == value
    if not scored:
        assert tokens_of(got) == tokens_of(expected)
    assert sharing.counters.real_tokens < 0.8 * sharing.counters.request_tokens
    assert apart.counters.real_tokens == apart.counters.request_tokens


@pytest.mark.parametrize("attention", ["xla", pytest.param("blocks", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scored", [True, False])
def test_what_is_shared_changes_nothing(model: LlavaModel, attention: str, scored: bool) -> None:
    with tuning.use(Tuning(attention=attention)):
        for seed in range(2):
            requests = conversations(20, seed=seed, scored=scored)
            sharing, apart = make_engine(model, SHARING), make_engine(model, APART)
            assert_equal(sharing, apart, requests, scored)


@pytest.mark.slow
@pytest.mark.parametrize("row_length", [64, 192])
def test_fifty_mixed_windows(model: LlavaModel, row_length: int) -> None:
    """Groups larger than a row, images of more tokens than the capacity, requests carried over."""
    shapes = dataclasses.replace(SHARING, row_length=row_length, longest_prompt=64)
    apart = dataclasses.replace(shapes, share_prefixes=False)
    for scored in (True, False):
        requests = conversations(50 * 16, seed=row_length, scored=scored)
        engines = [make_engine(model, each, capacity=3) for each in (shapes, apart)]
        assert_equal(*engines, requests, scored)


def test_the_system_text_is_shared_by_images(model: LlavaModel) -> None:
    requests = [
        dataclasses.replace(r, images=(ImageInput(r.images[0].crops),))
        for r in conversations(8, seed=2, scored=True)
        if r.images
    ]
    assert_equal(make_engine(model, SHARING), make_engine(model, APART), requests, True)


@pytest.mark.usefixtures("no_compilation_cache")
def test_windows_with_and_without_groups_compile_nothing_after_a_warm_up(
    model: LlavaModel, compiled: list[str]
) -> None:
    make_engine(model, SHARING).warm_up()
    for count in (1, 2):
        list(make_engine(model, SHARING).score(conversations(count, seed=1, scored=True)))
    compiled.clear()
    engine = make_engine(model, SHARING)
    for seed in range(4):
        for count in (1, 7, 17):
            for scored in (True, False):
                run = engine.score if scored else engine.generate
                list(run(conversations(count, seed=seed, scored=scored)))
                list(run(make_requests(count, seed, None if scored else 3)))
    assert compiled == []


def stepped(engine: Engine, requests: list[Request]) -> dict[int, tuple[int, ...]]:
    """Tokens of the answers, step by step; at the end no page is taken."""
    for request in requests:
        engine.submit(request)
    answers = {}
    while engine.core.is_busy:
        for event in engine.step():
            if isinstance(event, Answer):
                answers[event.key] = event.token_ids
    assert engine.core.decoder is not None
    assert engine.core.decoder.taken_pages == engine.core.decoder.valid_tokens == 0
    return answers


@pytest.mark.parametrize("pages", [None, 9])
@pytest.mark.slow
def test_pages_of_a_prefix_are_given_back(model: LlavaModel, pages: int | None) -> None:
    shapes = dataclasses.replace(SHARING, slots=8, page_size=8, pages=pages)
    requests = conversations(24, seed=5)
    answers = stepped(make_engine(model, shapes), requests)
    apart = dataclasses.replace(shapes, share_prefixes=False)
    expected = stepped(make_engine(model, apart), requests)
    assert answers == expected


@pytest.mark.slow
def test_a_mesh_shares_as_one_device_does(model: LlavaModel) -> None:
    require_eight_devices()
    sharded = sharded_engine(model, (2, 2, 2))
    shapes = dataclasses.replace(sharded.shapes, window_size=16)
    sharded = Engine(sharded.model, sharded.reduction, shapes)
    apart = make_engine(model, dataclasses.replace(shapes, share_prefixes=False))
    for scored in (True, False):
        requests = conversations(30, seed=4, scored=scored)
        with sharding.use_mesh(sharded.model.mesh):
            got = by_key((sharded.score if scored else sharded.generate)(requests))
        expected = by_key((apart.score if scored else apart.generate)(requests))
        assert tokens_of(got) == tokens_of(expected)
        if scored:
            for key, answer in got.items():
                # CPUs round differently: 1.6e-5 was seen.
                value = pytest.approx(expected[key].log_likelihood, rel=5e-5, abs=1e-4)
                assert answer.log_likelihood == value
    assert sharded.counters.real_tokens < sharded.counters.request_tokens


def test_windows_end_between_images_where_that_leaves_half_of_them() -> None:
    def about(names: str) -> Iterator[Request]:
        crops = np.zeros((1, 2, 2, 3), np.uint8)
        for key, name in enumerate(names):
            images = (ImageInput(crops, key=name),) if name != "-" else ()
            ids = np.array([IMAGE_TOKEN] if images else [1], np.int32)
            yield Request(key, ids, images)

    def end(names: str) -> int:
        return window_end(list(about(names)))

    assert end("aabbc") == 4
    assert end("aabbb") == 4  # half a window is not moved
    assert end("aaabb") == 3
    assert end("aaaaa") == 4
    assert end("a----") == 4
