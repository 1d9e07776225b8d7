"""The engine against one-at-a-time runs, and its invariants."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prumerge_jax import reductions, sharding
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.engine import programs
from prumerge_jax.engine.encoding import PlacedModel
from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.request import (
    Answer,
    Delta,
    ImageInput,
    Request,
    SamplingParams,
)
from prumerge_jax.engine.shapes import EngineShapes
from prumerge_jax.models import tuning
from prumerge_jax.models.config import TextConfig, published
from prumerge_jax.models.llava import LlavaModel, abstract_model, inference_layout
from prumerge_jax.models.tuning import Tuning
from tests.conftest import require_eight_devices
from tests.tiny_llava import random_llava

SMALL = EngineShapes(
    batch_size=2,
    window_size=4,
    row_length=96,
    longest_prompt=96,
    prefill_rows=2,
    slots=2,
    cache_length=64,
    page_size=16,
    decode_steps_per_call=3,
)
CONFIG = dataclasses.replace(
    published("tiny"),
    text=TextConfig(
        vocab_size=500, width=48, mlp_width=96, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=12, max_positions=256,
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def plain() -> Iterator[None]:
    """The reference forms; tests of others say which."""
    with tuning.use(Tuning.plain()):
        yield


@pytest.fixture(scope="module")
def model() -> LlavaModel:
    return random_llava(CONFIG, gain=4)  # so large that different prompts give different answers


def make_engine(
    model: LlavaModel,
    shapes: EngineShapes = SMALL,
    reduction: str = "prumerge",
    **overrides: int,
) -> Engine:
    graphdef, state = nnx.split(model)
    spelling = reductions.with_parameters(reduction, **overrides)
    placed = PlacedModel(graphdef, state, CONFIG, jnp.dtype(jnp.float32))
    return Engine(placed, reductions.parse(spelling), shapes)


def make_requests(count: int, seed: int = 0, max_new_tokens: int | None = None) -> list[Request]:
    """Random requests; those without `max_new_tokens` have a continuation to score."""
    rng = np.random.default_rng(seed)
    requests = []
    for key in range(count):
        text = rng.integers(3, 500, size=rng.integers(3, 20)).astype(np.int32)
        images: tuple[ImageInput, ...] = ()
        if key % 5 != 4:  # every fifth is text only
            text[rng.integers(1, len(text))] = IMAGE_TOKEN
            images = (ImageInput(rng.integers(0, 256, size=(1, 56, 56, 3)).astype(np.uint8)),)
        continuation = np.zeros(0, np.int32)
        if max_new_tokens is None:
            continuation = rng.integers(3, 500, size=rng.integers(1, 6)).astype(np.int32)
        sampling = SamplingParams(max_new_tokens=max_new_tokens or 1)
        requests.append(Request(key, text, images, continuation, sampling))
    return requests


def with_sampling(requests: list[Request], **fields: float | tuple[int, ...]) -> list[Request]:
    """Requests that are sampled differently; a `seed` is added to the key."""
    changed = []
    for request in requests:
        values = fields | ({"seed": fields["seed"] + request.key} if "seed" in fields else {})
        sampling = dataclasses.replace(request.sampling, **values)
        changed.append(dataclasses.replace(request, sampling=sampling))
    return changed


def by_key(answers: Iterable[Answer]) -> dict[int, Answer]:
    found: dict[int, Answer] = {}
    for answer in answers:
        assert answer.key not in found
        found[answer.key] = answer
    return found


def tokens_of(answers: dict[int, Answer]) -> dict[int, tuple[int, ...]]:
    return {key: answer.token_ids for key, answer in answers.items()}


@functools.partial(jax.jit, static_argnums=0)
def row_logits(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    ids: jax.Array,
    visual: jax.Array,
    index: jax.Array,
    segments: jax.Array,
) -> jax.Array:
    """Logits [1, T, V] of rows whose padding has segment 0."""
    model = nnx.merge(graphdef, state)
    x = model.embed_rows(ids, visual, index)
    bias = model.key_bias(visual, index)
    hidden = model.decoder(x, jnp.arange(ids.shape[1])[None], segments, key_bias=bias)
    return model.decoder.logits(hidden)


def naive_logits(
    model: LlavaModel, request: Request, tokens: np.ndarray, reduction: str
) -> jax.Array:
    """Logits [T, V] of one request alone in its row, straight through the model."""
    index = np.full(len(tokens), -1)
    parsed = reductions.parse(reduction)
    width = CONFIG.vision.width + parsed.weighs_tokens
    visual = jnp.zeros((1, parsed.capacity_for(CONFIG.vision.num_patches), width))
    ids = tokens
    if request.images:
        reduced = programs.encode(
            *nnx.split(model),
            jnp.asarray(request.images[0].crops),
            reduction=parsed,
            dtype=jnp.dtype(jnp.float32),
        )
        count = int(reduced.lengths[0])
        (at,) = np.flatnonzero(tokens == IMAGE_TOKEN)
        visual = reduced.tokens
        index = np.insert(np.delete(index, at), [at] * count, np.arange(count))
        ids = np.insert(np.delete(tokens, at), [at] * count, 0)
    length = len(ids)
    padding = (0, -length % 64)  # few lengths, and so few to compile
    row = [np.pad(ids, padding), np.pad(index, padding, constant_values=-1)]
    segments = np.pad(np.ones(length, np.int32), padding)
    ids, index, segments = (jnp.asarray(values)[None] for values in (*row, segments))
    return row_logits(*nnx.split(model), ids, visual, index, segments)[0, :length]


def test_scores_equal_one_at_a_time(model: LlavaModel) -> None:
    requests = make_requests(11)
    got = by_key(make_engine(model).score(requests))
    for request in requests:
        tokens = np.concatenate([request.token_ids, request.continuation])
        logits = naive_logits(model, request, tokens, "prumerge")
        ahead = jax.nn.log_softmax(logits)[-len(request.continuation) - 1 : -1]
        expected = ahead[jnp.arange(len(request.continuation)), request.continuation].sum()
        answer = got[request.key]
        assert answer.log_likelihood == pytest.approx(float(expected), abs=1e-4)
        assert (answer.usage.visual_tokens == 0) == (not request.images)
        assert answer.usage.text_tokens == len(request.token_ids) - len(request.images)


@pytest.mark.parametrize(
    "reduction", ["prumerge", pytest.param("cover:tokens=4,merge=mean", marks=pytest.mark.slow)]
)
def test_generation_equals_one_at_a_time_recomputation(model: LlavaModel, reduction: str) -> None:
    """Packed prefill, slots and cache against a full forward pass per token."""
    requests = make_requests(7, seed=1, max_new_tokens=9)
    got = by_key(make_engine(model, reduction=reduction).generate(requests))
    lengths = set()
    for request in requests[:4]:
        tokens, reason = request.token_ids, "length"
        for _ in range(9):
            token = int(naive_logits(model, request, tokens, reduction)[-1].argmax())
            if token in CONFIG.eos_token_ids:
                reason = "stop"
                break
            tokens = np.append(tokens, token)
        answer = got[request.key]
        assert answer.token_ids == tuple(tokens[len(request.token_ids) :].tolist())
        assert (answer.finish_reason, answer.usage.new_tokens) == (reason, len(answer.token_ids))
        lengths.add(answer.token_ids)
    assert len(lengths) > 1, "all answers are the same: the test shows nothing"


@pytest.mark.parametrize(
    "shapes",
    [
        dict(batch_size=4, window_size=4, row_length=64, prefill_rows=1, slots=1, cache_length=64,
             decode_steps_per_call=1, pages=4),
        dict(batch_size=1, window_size=16, row_length=256, prefill_rows=4, slots=8, cache_length=96,
             decode_steps_per_call=32, page_size=128),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_shapes_and_arrival_order_change_nothing(model: LlavaModel, shapes: dict[str, int]) -> None:
    requests = make_requests(13, seed=2, max_new_tokens=7)
    order = np.random.default_rng(0).permutation(len(requests))
    other = make_engine(model, EngineShapes(longest_prompt=64, **shapes))
    scored = make_requests(13, seed=2)
    with tuning.use(Tuning(attention="blocks")):
        got = by_key(other.generate([requests[i] for i in order]))
        scores = by_key(other.score([scored[i] for i in order]))
    assert tokens_of(got) == tokens_of(by_key(make_engine(model).generate(requests)))
    expected = by_key(make_engine(model).score(scored))
    for key, answer in scores.items():  # some -50; CPUs round differently, 4e-6 of it was seen
        value = pytest.approx(expected[key].log_likelihood, rel=1e-5, abs=1e-4)
        assert answer.log_likelihood == value


@pytest.mark.slow
def test_layers_apart_compute_what_a_stack_does(model: LlavaModel) -> None:
    copy = jax.tree.map(jnp.copy, nnx.state(model))
    with tuning.use(Tuning(layers="list")):
        separate = nnx.merge(*inference_layout(nnx.graphdef(model), copy))
    assert len(separate.decoder.layers) == CONFIG.text.num_layers
    apart, stack = make_engine(separate), make_engine(model)
    requests = make_requests(9, seed=12)
    scores, expected = (by_key(engine.score(requests)) for engine in (apart, stack))
    requests = make_requests(9, seed=12, max_new_tokens=5)
    answers, others = (by_key(engine.generate(requests)) for engine in (apart, stack))
    for key in expected:
        assert scores[key].log_likelihood == pytest.approx(expected[key].log_likelihood, abs=1e-5)
        assert answers[key].token_ids == others[key].token_ids


@pytest.mark.slow
def test_sampling_depends_on_the_request_alone(model: LlavaModel) -> None:
    # No image of these has a patch within rounding of the threshold: the tower's last bits depend
    # on the batch size, and one patch more is another answer.
    plain = make_requests(6, seed=2, max_new_tokens=6)
    requests = with_sampling(plain, temperature=1.0, top_p=0.9, seed=7)
    first = by_key(make_engine(model).generate(requests))
    wide = dataclasses.replace(
        SMALL, batch_size=4, window_size=8, prefill_rows=1, slots=4, decode_steps_per_call=16
    )
    second = by_key(make_engine(model, wide).generate(requests[::-1]))
    assert tokens_of(first) == tokens_of(second)
    third = by_key(make_engine(model).generate(with_sampling(requests, seed=1000)))
    assert tokens_of(first) != tokens_of(third)


def test_every_request_of_a_batch_is_sampled_its_own_way(model: LlavaModel) -> None:
    """Greedy, sampled and cut to the nucleus in one batch, as each in a batch of its kind."""
    plain = make_requests(8, seed=2, max_new_tokens=6)
    kinds = [
        plain,
        with_sampling(plain, temperature=1.5, seed=7),
        with_sampling(plain, temperature=1.5, top_p=0.2, seed=7),
        with_sampling(plain, temperature=1.0, top_p=0.9, seed=7),
    ]
    alone = [tokens_of(by_key(make_engine(model).generate(requests))) for requests in kinds]
    assert alone[0] != alone[1] != alone[2] != alone[3]
    for shift in range(len(kinds)):
        kind_of = [(key + shift) % len(kinds) for key in range(len(plain))]
        mixed = [kinds[kind][key] for key, kind in enumerate(kind_of)]
        got = tokens_of(by_key(make_engine(model).generate(mixed)))
        assert got == {key: alone[kind][key] for key, kind in enumerate(kind_of)}


def test_one_new_token_needs_no_slot(model: LlavaModel) -> None:
    requests = make_requests(5, seed=1, max_new_tokens=1)
    one = by_key(make_engine(model).generate(requests))
    many = by_key(make_engine(model).generate(with_sampling(requests, max_new_tokens=5)))
    assert all(one[k].token_ids == many[k].token_ids[:1] for k in one)


def test_answers_that_end_at_once_while_others_wait_for_a_slot(model: LlavaModel) -> None:
    """Every token in turn is declared a stop id: answers stop there, none is lost."""
    requests = make_requests(9, seed=1, max_new_tokens=5)
    free = by_key(make_engine(model).generate(with_sampling(requests, stop_ids=())))
    assert all(answer.finish_reason == "length" for answer in free.values())
    for stop in {answer.token_ids[0] for answer in free.values()}:
        stops = (stop, 499, 498)
        got = by_key(make_engine(model).generate(with_sampling(requests, stop_ids=stops)))
        for key, answer in free.items():
            ends = [i for i, token in enumerate(answer.token_ids) if token in stops]
            expected = answer.token_ids[: ends[0]] if ends else answer.token_ids
            assert got[key].token_ids == expected
            assert got[key].finish_reason == ("stop" if ends else "length")


def test_stop_ids_are_each_requests_own(model: LlavaModel) -> None:
    requests = with_sampling(make_requests(9, seed=1, max_new_tokens=5), stop_ids=())
    free = by_key(make_engine(model).generate(requests))
    stops = {key: answer.token_ids[key % 5] for key, answer in free.items()}
    own = [with_sampling([r], stop_ids=(stops[r.key],))[0] for r in requests]
    for key, answer in by_key(make_engine(model).generate(own)).items():
        tokens = free[key].token_ids
        assert answer.token_ids == tokens[: tokens.index(stops[key])]


def test_streamed_tokens_add_up_to_the_answers(model: LlavaModel) -> None:
    requests = make_requests(9, seed=1, max_new_tokens=8)
    streamed: dict[int, list[int]] = {request.key: [] for request in requests}
    answers: dict[int, Answer] = {}
    pieces = 0
    for event in make_engine(model).stream(requests):
        assert event.key not in answers, "something came after the answer"
        if isinstance(event, Delta):
            assert event.token_ids
            streamed[event.key] += event.token_ids
            pieces += 1
        else:
            answers[event.key] = event
    assert pieces > 2 * len(requests)
    assert {key: tuple(tokens) for key, tokens in streamed.items()} == tokens_of(answers)
    assert tokens_of(answers) == tokens_of(by_key(make_engine(model).generate(requests)))


def test_images_over_capacity_are_encoded_again(model: LlavaModel) -> None:
    """A capacity that only some images fit into changes no score."""
    requests = make_requests(9, seed=4)
    expected = by_key(make_engine(model).score(requests))
    counts = sorted(a.usage.visual_tokens for a in expected.values() if a.usage.visual_tokens)
    assert counts[0] < counts[-1]
    got = by_key(make_engine(model, capacity=counts[0]).score(requests))
    assert got.keys() == expected.keys()
    for key, answer in got.items():
        assert answer.usage == expected[key].usage
        assert answer.log_likelihood == pytest.approx(expected[key].log_likelihood, abs=1e-4)


def test_what_cannot_run_is_reported_and_disturbs_nobody(model: LlavaModel) -> None:
    requests = make_requests(6, seed=5, max_new_tokens=4)
    expected = by_key(make_engine(model).generate(requests))
    four, too_many = SamplingParams(max_new_tokens=4), SamplingParams(max_new_tokens=500)
    long = Request(100, np.full(200, 5, np.int32), sampling=four)
    endless = Request(101, np.full(5, 5, np.int32), sampling=too_many)
    engine = make_engine(model)
    got = by_key(engine.generate([requests[0], long, *requests[1:], endless]))
    assert (engine.counters.requests, engine.counters.images) == (6, 5)
    assert got[100].finish_reason == got[101].finish_reason == "error"
    assert "200 tokens" in str(got.pop(100).error)
    assert "500 may follow" in str(got.pop(101).error)
    assert tokens_of(got) == tokens_of(expected)


def test_broken_weights_are_an_error_not_an_answer(model: LlavaModel) -> None:
    graphdef, state = nnx.split(model)
    state = jax.tree.map(lambda x: x, state)
    state["vision"]["last"]["q_proj"]["bias"][...] = jnp.full(CONFIG.vision.width, jnp.nan)
    engine = make_engine(nnx.merge(graphdef, state))
    answers = by_key(engine.score(make_requests(5)))
    for request in make_requests(5):
        error = answers[request.key].error
        assert ("not finite" in str(error)) if request.images else (error is None)


def test_shared_images_are_encoded_once(model: LlavaModel) -> None:
    crops = make_requests(1)[0].images[0].crops
    alone = [
        dataclasses.replace(request, images=(ImageInput(crops),))
        for request in make_requests(8, seed=6)
        if request.images
    ]
    sharing = [dataclasses.replace(r, images=(ImageInput(crops, key="same"),)) for r in alone]
    apart = make_engine(model)
    expected = by_key(apart.score(alone))
    shared = make_engine(model, dataclasses.replace(SMALL, window_size=8))
    got = by_key(shared.score(sharing))
    assert (apart.counters.images, shared.counters.images) == (len(alone), 1)
    assert apart.counters.requests == shared.counters.requests == len(alone)
    for key, answer in got.items():
        assert answer.log_likelihood == pytest.approx(expected[key].log_likelihood, abs=1e-4)


@pytest.mark.usefixtures("no_compilation_cache")
def test_each_stage_compiles_once(model: LlavaModel, compiled: list[str]) -> None:
    """Fifty windows of other lengths, contents and sampling after a warm-up compile nothing."""
    make_engine(model).warm_up()
    list(make_engine(model).score(make_requests(1, seed=7)))
    compiled.clear()
    engine = make_engine(model)
    requests = make_requests(200, seed=8, max_new_tokens=5)
    sampled = [
        with_sampling([r], temperature=r.key % 3 / 2, top_p=1 - r.key % 4 / 8, seed=3)[0]
        for r in requests
    ]
    list(engine.generate(sampled))
    list(engine.score(make_requests(200, seed=9)))
    assert compiled == []
    jnp.ones(3).at[jnp.array([1])].mul(7.25).block_until_ready()
    jax.jit(lambda x: x * 3.5 - 1)(jnp.ones(3))
    assert compiled, "the listener hears nothing: the test shows nothing"


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)])
@pytest.mark.slow
def test_windows_of_every_size_compile_nothing_after_a_warm_up(
    model: LlavaModel, compiled: list[str], sizes: tuple[int, int, int] | None
) -> None:
    """With weights placed as `Llava.load` places them, with images and without."""
    engine = sharded_engine(model, sizes)
    with sharding.use_mesh(engine.model.mesh):
        engine.warm_up()
        list(engine.score(make_requests(1, seed=7)))
        compiled.clear()
        for count in range(1, engine.shapes.window_size + 2):
            for images in (True, False):
                mixed = make_requests(count, seed=count)
                some = mixed if images else [text_only(request) for request in mixed]
                assert len(list(engine.score(some))) == count
                assert len(list(engine.generate([without_continuation(r) for r in some]))) == count
    assert compiled == []


def test_a_capacity_that_overflows_is_warmed_up_too(model: LlavaModel, compiled: list[str]) -> None:
    requests = [without_continuation(request) for request in make_requests(9, seed=4)]
    engine = make_engine(model, capacity=2)
    engine.warm_up()
    compiled.clear()
    answers = by_key(engine.generate(requests))
    assert max(answer.usage.visual_tokens for answer in answers.values()) > 2
    assert compiled == []


def text_only(request: Request) -> Request:
    token_ids = request.token_ids[request.token_ids != IMAGE_TOKEN]
    return dataclasses.replace(request, token_ids=token_ids, images=())


def without_continuation(request: Request) -> Request:
    sampling = SamplingParams(max_new_tokens=4)
    return dataclasses.replace(request, continuation=np.zeros(0, np.int32), sampling=sampling)


def sharded_engine(model: LlavaModel, sizes: tuple[int, int, int] | None) -> Engine:
    """An engine on a mesh, or on one device that the weights are committed to."""
    graphdef, state = nnx.split(model)
    reduction, dtype = reductions.parse("prumerge"), jnp.dtype(jnp.float32)
    if sizes is None:
        state = jax.device_put(state, jax.devices()[0])
        return Engine(PlacedModel(graphdef, state, CONFIG, dtype), reduction, SMALL)
    require_eight_devices()
    mesh = sharding.make_mesh(*sizes)
    placed = jax.device_put(state, sharding.weight_shardings(abstract_model(CONFIG)[1], mesh))
    shapes = dataclasses.replace(SMALL, batch_size=8, window_size=8, prefill_rows=8, slots=8)
    return Engine(PlacedModel(graphdef, placed, CONFIG, dtype, mesh=mesh), reduction, shapes)


@pytest.mark.slow
@pytest.mark.parametrize(("sizes"), [(2, 2, 2), (8, 1, 1)])
def test_mesh_equals_one_device(model: LlavaModel, sizes: tuple[int, int, int]) -> None:
    sharded = sharded_engine(model, sizes)
    plain = make_engine(model, sharded.shapes)
    scored = make_requests(11, seed=10)
    requests = make_requests(11, seed=10, max_new_tokens=6)
    sampled = with_sampling(requests[::2], temperature=0.7, top_p=0.8, seed=5) + requests[1::2]
    with sharding.use_mesh(sharded.model.mesh):
        scores = by_key(sharded.score(scored))
        answers = by_key(sharded.generate(requests))
        drawn = by_key(sharded.generate(sampled))
    expected = by_key(plain.score(scored))
    for key in expected:
        # CPUs round differently: 1.1e-5 was seen.
        value = pytest.approx(expected[key].log_likelihood, rel=5e-5)
        assert scores[key].log_likelihood == value
    assert tokens_of(answers) == tokens_of(by_key(plain.generate(requests)))
    assert tokens_of(drawn) == tokens_of(by_key(plain.generate(sampled)))
