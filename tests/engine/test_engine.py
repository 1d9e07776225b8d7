"""The engine against one-at-a-time runs, and its invariants."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prumerge_jax import prumerge
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.engine import programs
from prumerge_jax.engine.decoding import generate
from prumerge_jax.engine.engine import Engine, Query, Result
from prumerge_jax.engine.scoring import score
from prumerge_jax.engine.shapes import Shapes
from prumerge_jax.models.config import TextConfig, published
from prumerge_jax.models.llama import KVCache
from prumerge_jax.models.llava import LlavaModel, inference_layout
from tests.conftest import require_eight_devices
from tests.tiny_llava import random_llava

SMALL = Shapes(
    batch_size=2,
    window=4,
    row_length=96,
    longest_prompt=96,
    rows=2,
    slots=2,
    cache_length=64,
    chunk=3,
)
CONFIG = dataclasses.replace(
    published("tiny"),
    text=TextConfig(
        vocab_size=500, width=48, mlp_width=96, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=12, max_positions=256,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LlavaModel:
    return random_llava(CONFIG, gain=4)  # so large that different prompts give different answers


def make_engine(
    model: LlavaModel,
    config: Shapes = SMALL,
    reduction: str = "prumerge",
    implementation: str = "xla",
    **overrides: int,
) -> Engine:
    graphdef, state = nnx.split(model)
    return Engine(
        graphdef,
        state,
        CONFIG,
        prumerge.preset(reduction, **overrides),
        config,
        dtype=jnp.float32,
        implementation=implementation,
    )


def make_queries(count: int, seed: int = 0, **fields: int) -> list[Query]:
    rng = np.random.default_rng(seed)
    queries = []
    for key in range(count):
        text = rng.integers(3, 500, size=rng.integers(3, 20)).astype(np.int32)
        pixels = None
        if key % 5 != 4:  # every fifth is text only
            text[rng.integers(1, len(text))] = IMAGE_TOKEN
            pixels = rng.integers(0, 256, size=(56, 56, 3)).astype(np.uint8)
        continuation = np.zeros(0, np.int32)
        if "max_new_tokens" not in fields:
            continuation = rng.integers(3, 500, size=rng.integers(1, 6)).astype(np.int32)
        queries.append(Query(key, text, pixels, continuation=continuation)._replace(**fields))
    return queries


def by_key(results: list[Result]) -> dict[int, Result]:
    keys = [result.key for result in results]
    assert len(set(keys)) == len(keys)
    return {result.key: result for result in results}


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
    hidden = model.decoder(x, jnp.arange(ids.shape[1])[None], segments)
    return model.decoder.logits(hidden)


def naive_logits(model: LlavaModel, query: Query, tokens: np.ndarray, reduction: str) -> jax.Array:
    """Logits [T, V] of one query alone in its row, straight through the model."""
    index = np.full(len(tokens), -1)
    visual = jnp.zeros(
        (1, prumerge.preset(reduction).capacity_for(CONFIG.vision.num_patches), CONFIG.vision.width)
    )
    ids = tokens
    if query.pixels is not None:
        reduced = programs.encode(
            *nnx.split(model),
            jnp.asarray(query.pixels[None]),
            reduction=prumerge.preset(reduction),
            dtype=jnp.dtype(jnp.float32),
            implementation="xla",
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
    queries = make_queries(11)
    got = by_key(list(score(make_engine(model), queries)))
    for query in queries:
        tokens = np.concatenate([query.token_ids, query.continuation])
        logits = naive_logits(model, query, tokens, "prumerge")
        ahead = jax.nn.log_softmax(logits)[-len(query.continuation) - 1 : -1]
        expected = ahead[jnp.arange(len(query.continuation)), query.continuation].sum()
        assert got[query.key].log_likelihood == pytest.approx(float(expected), abs=1e-4)
        assert (got[query.key].visual_tokens == 0) == (query.pixels is None)


def test_generation_equals_one_at_a_time_recomputation(model: LlavaModel) -> None:
    """Packed prefill, slots and cache against a full forward pass per token."""
    queries = make_queries(7, seed=1, max_new_tokens=9)
    got = by_key(list(generate(make_engine(model), queries)))
    lengths = set()
    for query in queries[:4]:
        tokens = query.token_ids
        for _ in range(9):
            token = int(naive_logits(model, query, tokens, "prumerge")[-1].argmax())
            if token == CONFIG.eos_token_id:
                break
            tokens = np.append(tokens, token)
        assert got[query.key].token_ids == tokens[len(query.token_ids) :].tolist()
        lengths.add(tuple(got[query.key].token_ids))
    assert len(lengths) > 1, "all answers are the same: the test shows nothing"


@pytest.mark.parametrize(
    "shapes",
    [
        dict(batch_size=4, window=4, row_length=64, rows=1, slots=1, cache_length=64, chunk=1),
        dict(batch_size=1, window=16, row_length=256, rows=4, slots=8, cache_length=96, chunk=32),
    ],
)
def test_shapes_and_arrival_order_change_nothing(model: LlavaModel, shapes: dict[str, int]) -> None:
    queries = make_queries(13, seed=2, max_new_tokens=7)
    order = np.random.default_rng(0).permutation(len(queries))
    other = make_engine(model, Shapes(longest_prompt=64, **shapes), implementation="blocks")
    expected = by_key(list(generate(make_engine(model), queries)))
    got = by_key(list(generate(other, [queries[i] for i in order])))
    assert {k: r.token_ids for k, r in got.items()} == {k: r.token_ids for k, r in expected.items()}
    expected = by_key(list(score(make_engine(model), queries)))
    for key, result in by_key(list(score(other, [queries[i] for i in order]))).items():
        assert result.log_likelihood == pytest.approx(expected[key].log_likelihood, abs=1e-4)


def test_layers_apart_compute_what_a_stack_does(model: LlavaModel) -> None:
    copy = jax.tree.map(jnp.copy, nnx.state(model))
    separate = nnx.merge(*inference_layout(nnx.graphdef(model), copy))
    assert len(separate.decoder.layers) == CONFIG.text.num_layers
    apart, stack = make_engine(separate), make_engine(model)
    queries = make_queries(9, seed=12, max_new_tokens=5)
    scores, expected = (by_key(list(score(engine, queries))) for engine in (apart, stack))
    answers, others = (by_key(list(generate(engine, queries))) for engine in (apart, stack))
    for key in expected:
        assert scores[key].log_likelihood == pytest.approx(expected[key].log_likelihood, abs=1e-5)
        assert answers[key].token_ids == others[key].token_ids


def test_segments_move_into_the_cache_where_it_lies(model: LlavaModel) -> None:
    graphdef, state = nnx.split(model)
    shapes = {"slots": 64, "length": 64, "dtype": jnp.dtype(jnp.float32)}
    slots = programs.empty_slots(graphdef, state, **shapes)
    row, each = jnp.zeros((2, 64), jnp.int32), jnp.zeros((2,), jnp.int32)
    segments = programs.Segments(each, each, each, each, each.astype(jnp.uint32))
    packed = KVCache(*(part[:, :2] for part in slots.cache))
    insert = programs.insert.lower(
        slots, packed, programs.Rows(row, row, row, row), segments, each, each, eos=2
    )
    memory = insert.compile().memory_analysis()
    both = slots.cache.k.nbytes + slots.cache.v.nbytes
    assert memory.alias_size_in_bytes >= both
    assert memory.temp_size_in_bytes < both / 8


def test_sampling_depends_on_the_query_alone(model: LlavaModel) -> None:
    # No picture of these has a patch within rounding of the threshold: the tower's last bits depend
    # on the batch size, and one patch more is another answer.
    queries = [q._replace(seed=7 + q.key) for q in make_queries(6, seed=2, max_new_tokens=6)]
    sampling = programs.Sampling(temperature=1.0, top_p=0.9)
    first = by_key(list(generate(make_engine(model), queries, sampling)))
    wide = dataclasses.replace(SMALL, batch_size=4, window=8, rows=1, slots=4, chunk=16)
    second = by_key(list(generate(make_engine(model, wide), queries[::-1], sampling)))
    assert {k: r.token_ids for k, r in first.items()} == {k: r.token_ids for k, r in second.items()}
    reseeded = [q._replace(seed=1000 + q.key) for q in queries]
    third = by_key(list(generate(make_engine(model), reseeded, sampling)))
    assert [first[k].token_ids for k in first] != [third[k].token_ids for k in first]


def test_one_new_token_needs_no_slot(model: LlavaModel) -> None:
    queries = make_queries(5, seed=1, max_new_tokens=1)
    one = by_key(list(generate(make_engine(model), queries)))
    many = by_key(
        list(generate(make_engine(model), [q._replace(max_new_tokens=5) for q in queries]))
    )
    assert all(one[k].token_ids == many[k].token_ids[:1] for k in one)


def test_answers_that_end_at_once_while_others_wait_for_a_slot(model: LlavaModel) -> None:
    """Every token in turn is declared the end of sequence: answers stop there, none is lost."""
    queries = make_queries(9, seed=1, max_new_tokens=5)
    endless = make_engine(model)
    endless.model_config = dataclasses.replace(CONFIG, eos_token_id=-1)
    free = by_key(list(generate(endless, queries)))
    for eos in {result.token_ids[0] for result in free.values()}:
        engine = make_engine(model)
        engine.model_config = dataclasses.replace(CONFIG, eos_token_id=eos)
        got = by_key(list(generate(engine, queries)))
        for key, result in free.items():
            tokens = result.token_ids
            expected = tokens[: tokens.index(eos)] if eos in tokens else tokens
            assert got[key].token_ids == expected


def test_images_over_capacity_are_encoded_again(model: LlavaModel) -> None:
    """A capacity that only some images fit into changes no score."""
    queries = make_queries(9, seed=4)
    expected = by_key(list(score(make_engine(model), queries)))
    counts = sorted(r.visual_tokens for r in expected.values() if r.visual_tokens)
    assert counts[0] < counts[-1]
    got = by_key(list(score(make_engine(model, capacity=counts[0]), queries)))
    assert got.keys() == expected.keys()
    for key, result in got.items():
        assert result.visual_tokens == expected[key].visual_tokens
        assert result.log_likelihood == pytest.approx(expected[key].log_likelihood, abs=1e-4)


def test_what_cannot_run_is_reported_and_disturbs_nobody(model: LlavaModel) -> None:
    queries = make_queries(6, seed=5, max_new_tokens=4)
    expected = by_key(list(generate(make_engine(model), queries)))
    long = Query(100, np.full(200, 5, np.int32), None, max_new_tokens=4)
    too_many = Query(101, np.full(5, 5, np.int32), None, max_new_tokens=500)
    got = by_key(list(generate(make_engine(model), [queries[0], long, *queries[1:], too_many])))
    assert "200 tokens" in str(got.pop(100).error)
    assert "500 may follow" in str(got.pop(101).error)
    assert {k: r.token_ids for k, r in got.items()} == {k: r.token_ids for k, r in expected.items()}


def test_broken_weights_are_an_error_not_an_answer(model: LlavaModel) -> None:
    graphdef, state = nnx.split(model)
    state = jax.tree.map(lambda x: x, state)
    state["vision"]["last"]["q_proj"]["bias"][...] = jnp.full(CONFIG.vision.width, jnp.nan)
    engine = make_engine(nnx.merge(graphdef, state))
    results = by_key(list(score(engine, make_queries(5))))
    for query in make_queries(5):
        error = results[query.key].error
        assert (error is None) if query.pixels is None else ("not finite" in str(error))


def test_shared_images_are_encoded_once(model: LlavaModel) -> None:
    image = make_queries(1)[0].pixels
    queries = [
        q._replace(pixels=image, image_key="same")
        for q in make_queries(8, seed=6)
        if q.pixels is not None
    ]
    apart = make_engine(model)
    expected = by_key(list(score(apart, [q._replace(image_key=None) for q in queries])))
    shared = make_engine(model, dataclasses.replace(SMALL, window=8))
    got = by_key(list(score(shared, queries)))
    assert (apart.counters.images, shared.counters.images) == (len(queries), 1)
    for key, result in got.items():
        assert result.log_likelihood == pytest.approx(expected[key].log_likelihood, abs=1e-4)


def test_each_stage_compiles_once(model: LlavaModel) -> None:
    """Fifty windows of other lengths and contents after a warm-up compile nothing."""
    list(generate(make_engine(model), make_queries(9, seed=7, max_new_tokens=5)))
    list(score(make_engine(model), make_queries(9, seed=7)))
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
    )
    engine = make_engine(model)
    list(generate(engine, make_queries(200, seed=8, max_new_tokens=5)))
    list(score(engine, make_queries(200, seed=9)))
    assert compiled == []
    jnp.ones(3).at[jnp.array([1])].mul(7.25).block_until_ready()
    jax.jit(lambda x: x * 3.5 - 1)(jnp.ones(3))
    assert compiled, "the listener hears nothing: the test shows nothing"


@pytest.mark.parametrize(("sizes"), [(2, 2, 2), (8, 1, 1)])
def test_mesh_equals_one_device(model: LlavaModel, sizes: tuple[int, int, int]) -> None:
    from prumerge_jax import sharding
    from prumerge_jax.models.llava import abstract_model

    require_eight_devices()
    config = dataclasses.replace(SMALL, batch_size=8, window=8, rows=8, slots=8)
    queries = make_queries(11, seed=10, max_new_tokens=6)
    plain = make_engine(model, config)
    mesh = sharding.make_mesh(*sizes)
    graphdef, state = nnx.split(model)
    shardings = sharding.weight_shardings(abstract_model(CONFIG)[1], mesh)
    with sharding.use_mesh(mesh):
        sharded = Engine(
            graphdef,
            jax.device_put(state, shardings),
            CONFIG,
            plain.reduction,
            config,
            dtype=jnp.float32,
            mesh=mesh,
        )
        scores = by_key(list(score(sharded, queries)))
        answers = by_key(list(generate(sharded, queries)))
    expected = by_key(list(score(plain, queries)))
    for key in expected:
        assert scores[key].log_likelihood == pytest.approx(expected[key].log_likelihood, abs=1e-4)
    expected = by_key(list(generate(plain, queries)))
    assert {k: r.token_ids for k, r in answers.items()} == {
        k: r.token_ids for k, r in expected.items()
    }
