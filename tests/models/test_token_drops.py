"""Visual tokens that leave the decoder: against a decoder whose rows really get shorter."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from prumerge_jax import reductions
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.engine.encoding import PlacedModel
from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.request import ImageInput, Request, SamplingParams
from prumerge_jax.engine.shapes import EngineShapes
from prumerge_jax.models.config import TextConfig, published
from prumerge_jax.models.llama import Llama
from prumerge_jax.models.rotary import frequencies
from prumerge_jax.models.token_drops import attention_of, plan_of, text_raters
from tests.tiny_llava import random_llava

CONFIG = dataclasses.replace(
    published("tiny"),
    text=TextConfig(
        vocab_size=64, width=48, mlp_width=64, num_layers=4, num_heads=4, num_kv_heads=2,
        head_dim=12, max_positions=256,
    ),
)  # fmt: skip
DEPTH = CONFIG.text.num_layers
METHODS = {
    "fastv": "fastv:layer=2,keep=0.4",
    "pyramiddrop": "pyramiddrop:keep=0.6",
    "sparsevlm": "sparsevlm:schedule=192",
    "text": "fastv:layer=1,keep=0.5,of=text",
}
BEFORE, IMAGE, PROMPT, WHOLE = 3, 40, 52, 56
"""Where the image begins and ends in the sequence, its prompt and all of it."""


@pytest.fixture(scope="module")
def model():
    return random_llava(CONFIG, gain=3)


@pytest.fixture(scope="module")
def x():
    rng = np.random.default_rng(0)
    return (0.5 * rng.normal(size=(WHOLE, CONFIG.text.width))).astype(np.float32)


class Layer:
    """A layer of the decoder in NumPy, over a sequence that stands alone, in float64."""

    def __init__(self, decoder: Llama, index: int) -> None:
        state = nnx.to_flat_state(nnx.split(decoder.layers)[1])
        self.weights = {
            path[-2]: np.asarray(weight[...][index], np.float64) for path, weight in state
        }

    def normed(self, x, name: str):
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + CONFIG.text.rms_norm_eps)
        return x * self.weights[name]

    def heads(self, x, positions):
        h = self.normed(x, "input_layernorm")
        q, k, v = (
            (h @ self.weights[f"{name}_proj"]).reshape(len(x), -1, CONFIG.text.head_dim)
            for name in "qkv"
        )
        angle = np.asarray(positions)[:, None, None] * frequencies(CONFIG.text)
        cos, sin = np.cos(angle), np.sin(angle)

        def rotated(x):
            first, second = np.split(x, 2, axis=-1)
            return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

        groups = q.shape[1] // k.shape[1]
        return rotated(q), rotated(k).repeat(groups, axis=1), v.repeat(groups, axis=1)

    def attention(self, x, positions):
        """Weights [H, T, T]."""
        q, k, _ = self.heads(x, positions)
        logits = np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1])
        logits = np.where(np.tril(np.ones(logits.shape[1:], bool)), logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    def __call__(self, x, positions):
        mixed = np.einsum("hts,shd->thd", self.attention(x, positions), self.heads(x, positions)[2])
        x = x + mixed.reshape(len(x), -1) @ self.weights["o_proj"]
        h = self.normed(x, "post_attention_layernorm")
        gate = h @ self.weights["gate_proj"]
        inner = gate / (1 + np.exp(-gate)) * (h @ self.weights["up_proj"])
        return x + inner @ self.weights["down_proj"]


def raters_of(x, drops):
    if drops.raters == "last":
        return np.array([PROMPT - 1])
    words = np.arange(IMAGE, PROMPT)
    logits = x[BEFORE:IMAGE].astype(np.float64) @ x[words].T.astype(np.float64)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    mean = (weights / weights.sum(-1, keepdims=True)).mean(0)
    return words[mean > mean.mean()]


def clustered(rows, clusters):
    """SparseVLM's density peaks: centres and means of `rows` [n, D]."""
    rows = rows.astype(np.float64)
    distance = np.linalg.norm(rows[:, None] - rows[None], axis=-1) / np.sqrt(rows.shape[1])
    density = np.exp(-(np.sort(distance, axis=1)[:, :clusters] ** 2).mean(1))
    gap = np.where(density[None] > density[:, None], distance, distance.max()).min(1)
    centres = np.sort(np.argsort(-gap * density, kind="stable")[:clusters])
    home = centres[distance[:, centres].argmin(1)]
    home[centres] = centres
    return centres, np.stack([rows[home == centre].mean(0) for centre in centres])


def shortened(layers: list[Layer], x: np.ndarray, drops: reductions.Drops) -> np.ndarray:
    """Hidden states [T', D] of a sequence from which tokens are really taken out."""
    at, positions = np.arange(len(x)), np.arange(len(x))
    raters, x = raters_of(x, drops), x.astype(np.float64)
    may_leave = (at >= BEFORE) & (at < IMAGE)
    if drops.of == "text":
        may_leave = ~may_leave & (at < PROMPT - 1)
    shares, entered = dict(zip(drops.layers, drops.shares, strict=True)), x
    for index, layer in enumerate(layers):
        ranking = layer if drops.ranked_by == "coming" else layers[index - 1]
        if index in shares:
            # Of the previous layer the attention is to its own input.
            ranked = x if drops.ranked_by == "coming" else entered
            score = ranking.attention(ranked, positions)[:, np.isin(at, raters)].mean((0, 1))
            own = np.flatnonzero(may_leave[at])
            order = own[np.argsort(-score[own], kind="stable")]
            gone = order[int(may_leave.sum() * shares[index] + 1e-3) :]
            keep = np.setdiff1d(np.arange(len(at)), gone)
            if drops.recycled:
                best = np.sort(gone[: len(gone) * 3 // 10])
                centres, means = clustered(x[best], -(-len(best) // 10))
                x[best[centres]] = means
                keep = np.union1d(keep, best[centres])
            at, x, positions = at[keep], x[keep], positions[keep]
            if drops.renumbered:
                positions = np.arange(len(at))
        entered = x
        x = layer(x, positions)
    assert len(at) < WHOLE
    return x[at >= PROMPT - 1]


def emulated(decoder: Llama, x, drops, segments, asking, visual, positions):
    index = np.where(visual, 0, -1)
    hidden = run(*nnx.split(decoder), x, positions, segments, index, asking, drops=drops)
    return np.asarray(hidden).reshape(x.shape)


@functools.partial(jax.jit, static_argnames=("graphdef", "drops"))
def run(graphdef, state, x, positions, segments, index, asking, *, drops):
    decoder = nnx.merge(graphdef, state)
    plan = plan_of(drops, index, asking)
    hidden = decoder.hidden_before_last_mlp(x, positions, segments, drop_plan=plan)
    return decoder.last_mlp_at(hidden, jnp.arange(x.shape[0] * x.shape[1]))


def row_of(*starts, length):
    """Segments, asking columns, visual mask and positions of copies of the sequence in one row."""
    segments, visual = np.zeros((1, length), np.int32), np.zeros((1, length), bool)
    asking, positions = np.full((1, length), -1, np.int32), np.zeros((1, length), np.int32)
    for number, start in enumerate(starts, start=1):
        own = slice(start, start + WHOLE)
        segments[0, own], asking[0, own] = number, start + PROMPT - 1
        positions[0, own] = np.arange(WHOLE)
        visual[0, start + BEFORE : start + IMAGE] = True
    return segments, asking, visual, positions


@pytest.mark.parametrize("name", METHODS)
def test_masked_tokens_are_as_good_as_gone(model, x, name: str) -> None:
    drops = reductions.parse(METHODS[name]).drops(DEPTH)
    layers = [Layer(model.decoder, index) for index in range(DEPTH)]
    expected = np.asarray(model.decoder.norm(jnp.asarray(shortened(layers, x, drops), jnp.float32)))
    hidden = emulated(model.decoder, x[None], drops, *row_of(0, length=WHOLE))
    np.testing.assert_allclose(hidden[0, PROMPT - 1 :], expected, atol=2e-4)
    plain = functools.reduce(lambda x, layer: layer(x, np.arange(WHOLE)), layers, x)
    assert abs(model.decoder.norm(jnp.asarray(plain[PROMPT - 1])) - expected[0]).max() > 0.01


@pytest.mark.parametrize("name", ["fastv", pytest.param("sparsevlm", marks=pytest.mark.slow)])
def test_neighbours_in_a_row_change_nothing(model, x, name: str) -> None:
    drops = reductions.parse(METHODS[name]).drops(DEPTH)
    alone = emulated(model.decoder, x[None], drops, *row_of(0, length=WHOLE))[0]
    row = np.full((1, 2 * WHOLE + 9, x.shape[1]), np.nan, np.float32)
    row[0, :WHOLE], row[0, WHOLE : 2 * WHOLE] = 3 * x[::-1], x
    packed = emulated(model.decoder, row, drops, *row_of(0, WHOLE, length=row.shape[1]))
    np.testing.assert_allclose(
        packed[0, WHOLE + PROMPT - 1 : 2 * WHOLE], alone[PROMPT - 1 :], atol=2e-4
    )


@pytest.mark.golden
def test_last_token_ranks_as_in_the_loops(golden) -> None:
    if not (golden / "reducers").is_dir():
        pytest.skip("the golden data has no reducers/")
    data = np.load(golden / "reducers" / "independent.npz")
    k = data["rank_keys"][None]
    q = np.zeros_like(k)
    q[0, -1] = data["rank_query_last"]
    last = np.zeros((1, 40), np.float32)
    last[0, -1] = 1
    score = np.asarray(attention_of(q, k, last, np.ones((1, 40, 40), bool))[0])
    np.testing.assert_allclose(score, data["rank_attention_mean_of_heads"], atol=1e-6)
    for name in ("rank_fastv_keep13", "rank_pyramiddrop_half"):
        kept = 5 + np.argsort(-score[5:31], kind="stable")[:13]
        np.testing.assert_array_equal(np.sort(kept), data[name])


def test_raters_are_words_behind_the_image_and_weigh_alike(x) -> None:
    segments, asking, visual, _ = row_of(0, length=WHOLE)
    weights = np.asarray(text_raters(jnp.asarray(x[None]), segments, visual, asking)[0])
    expected = raters_of(x, reductions.parse("sparsevlm").drops(DEPTH))
    np.testing.assert_array_equal(np.flatnonzero(weights), expected)
    np.testing.assert_allclose(weights[expected], 1 / len(expected), rtol=1e-6)


SHAPES = EngineShapes(
    batch_size=2, window_size=4, row_length=96, longest_prompt=96, prefill_rows=1, slots=2,
    cache_length=64, page_size=16, decode_steps_per_call=3, share_prefixes=False,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_generated_tokens_are_those_that_scores_prefer(model, name: str) -> None:
    """What is generated does not see dropped tokens either, and positions go on as in a score."""
    placed = PlacedModel(*nnx.split(model), CONFIG, jnp.dtype(jnp.float32))
    engine = Engine(placed, reductions.parse(METHODS[name]), SHAPES)
    rng = np.random.default_rng(1)
    requests = []
    for key in range(3):
        ids = rng.integers(3, 60, size=9 + key).astype(np.int32)
        ids[2] = IMAGE_TOKEN
        image = ImageInput(rng.integers(0, 256, size=(1, 56, 56, 3)).astype(np.uint8))
        sampling = SamplingParams(max_new_tokens=5, stop_ids=())
        requests.append(Request(key, ids, (image,), sampling=sampling))
    answers = {answer.key: answer.token_ids for answer in engine.generate(requests)}
    likeliest = {}
    for token in range(CONFIG.text.vocab_size):
        candidates = [
            dataclasses.replace(r, continuation=np.array([*answers[r.key][:-1], token], np.int32))
            for r in requests
        ]
        for answer in engine.score(candidates):
            best = likeliest.setdefault(answer.key, (-np.inf, -1))
            likeliest[answer.key] = max(best, (answer.log_likelihood, token))
    assert {key: token for key, (_, token) in likeliest.items()} == {
        key: tokens[-1] for key, tokens in answers.items()
    }
