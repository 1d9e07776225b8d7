"""Chosen lengths, and what the default shapes cost over two thousand images."""

import collections
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from prumerge_jax import prumerge
from prumerge_jax.data import packing
from prumerge_jax.data.conversation import TEMPLATES, evaluation_prompt
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.digits import questions as digits_questions
from prumerge_jax.digits import tokenizer as digits_tokenizer
from prumerge_jax.engine.decoding import generate
from prumerge_jax.engine.engine import Encoding, Engine, Images, Query, Result
from prumerge_jax.engine.scoring import score
from prumerge_jax.engine.shapes import EngineConfig, Shapes, fit, tight_row_length
from prumerge_jax.models.config import LlavaConfig, TextConfig, VisionConfig
from tests.tiny_llava import random_llava

IMAGES = 2000
LLAVA_PATCHES, DIGITS_PATCHES = 576, 144
STAGES = {
    score: ("encode", "join", "read", "log_likelihoods"),
    generate: ("encode", "join", "prefill", "first_tokens", "insert", "decode"),
}


def fitted(reduction: str, patches: int, text_tokens: np.ndarray, **fields: int) -> Shapes:
    return fit(
        EngineConfig(**fields),
        prumerge.preset(reduction),
        patches,
        text_tokens,
        max_new_tokens=2,
        max_positions=4096,
    )


def test_lengths_fit_the_published_model() -> None:
    text = np.full(50, 61)
    full = fitted("full", LLAVA_PATCHES, text)
    assert (full.row_length, full.cache_length) == (640, 640)
    ours = fitted("prumerge", LLAVA_PATCHES, text)
    assert (ours.row_length, ours.longest_prompt, ours.cache_length) == (1024, 256, 256)
    assert fitted("prumerge+", LLAVA_PATCHES, text).row_length == 1024
    given_length = fitted("full", LLAVA_PATCHES, text, row_length=2000)
    assert (given_length.row_length, given_length.cache_length) == (2000, 640)
    assert fitted("full", LLAVA_PATCHES, np.full(1, 9000)).cache_length == 4096
    assert fitted("full", LLAVA_PATCHES, np.zeros(0, np.int64)).row_length == 640


@settings(max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 1500), min_size=1, max_size=40),
    capacity=st.sampled_from([None, 3]),
)
def test_every_sequence_has_room_and_no_length_of_the_choice_pads_less(
    lengths: list[int], capacity: int | None
) -> None:
    text = np.array(lengths)
    for name in ("full", "prumerge", "prumerge+"):
        reduction = prumerge.preset(name, capacity=capacity)
        most = prumerge.preset(name).capacity_for(DIGITS_PATCHES)
        shapes = fit(EngineConfig(), reduction, DIGITS_PATCHES, text, max_positions=4096)
        assert text.max() + most <= shapes.longest_prompt <= shapes.row_length
        assert text.max() + most <= shapes.cache_length
        assert shapes.row_length % 128 == 0

    def computed(row_length: int) -> int:
        return row_length * len(packing.fill_rows(lengths, row_length))

    chosen = tight_row_length(text)
    for row_length in range(-(-text.max() // 128) * 128, 2 * text.max(), 128):
        assert computed(chosen) <= computed(row_length)


def digits_counts(rng: np.random.Generator) -> np.ndarray:
    """The distribution measured on the digits' test pictures: mean 24, 5/50/95 % 15/25/31."""
    return np.interp(rng.random(IMAGES), [0, 0.05, 0.5, 0.95, 1], [8, 15, 25, 31, 37])


def digits_text(tmp_path: pathlib.Path) -> np.ndarray:
    """Tokens of the prompts of `digits_vqa`, without the image."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(digits_tokenizer.build_for_digits())
    tokenizer = Tokenizer(path)
    lengths = []
    for index in range(100):
        _, questions = digits_questions.draw_with_questions("test", index, seed=0)
        for question in questions:
            prompt = evaluation_prompt(TEMPLATES["vicuna_v1"], question.text)
            lengths.append(len(tokenizer.encode_prompt(prompt)) - 1)
    return np.resize(lengths, IMAGES)


def lognormal_counts(rng: np.random.Generator) -> np.ndarray:
    """Mean 40, the logarithm's deviation .45."""
    return rng.lognormal(np.log(40) - 0.45**2 / 2, 0.45, IMAGES).clip(2, 145)


class DrawnCounts(Engine):
    """An engine that takes the visual tokens of query i to be `counts[i]`."""

    counts: np.ndarray

    def measure(self, encoding: Encoding) -> Images:
        images = super().measure(encoding)
        lengths = images.lengths.copy()
        for number, query in enumerate(encoding.queries):
            lengths[number % len(lengths), number // len(lengths)] = self.counts[query.key]
        return images._replace(lengths=lengths)


def tiny_config(width: int) -> LlavaConfig:
    """Patches of one pixel; every width is a model that no other test has compiled."""
    return LlavaConfig(
        vision=VisionConfig(
            image_size=13, patch_size=1, width=width, mlp_width=8, num_layers=2, num_heads=1
        ),
        text=TextConfig(
            vocab_size=32, width=8, mlp_width=8, num_layers=1, num_heads=1, num_kv_heads=1,
            head_dim=8,
        ),
        eos_token_id=-1,
    )  # fmt: skip


@pytest.fixture
def compiled() -> Iterator[collections.Counter[str]]:
    """How often each program has been compiled since the test began."""
    counter: collections.Counter[str] = collections.Counter()

    def heard(event: str, duration: float, **fields: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            counter[str(fields["fun_name"])] += 1

    jax.monitoring.register_event_duration_secs_listener(heard)
    yield counter
    jax.monitoring.unregister_event_duration_listener(heard)


@pytest.mark.parametrize(
    ("run", "kind", "width"),
    [(score, "digits", 6), (score, "lognormal", 10), (generate, "digits", 6)],
)
def test_two_thousand_images_compile_once_and_waste_less_than_a_twentieth(
    run: Callable[[Engine, list[Query]], Iterator[Result]],
    kind: str,
    width: int,
    compiled: collections.Counter[str],
    tmp_path: pathlib.Path,
) -> None:
    rng = np.random.default_rng(0)
    if kind == "digits":
        patches, counts, text_tokens = DIGITS_PATCHES, digits_counts(rng), digits_text(tmp_path)
    else:
        patches, counts, text_tokens = LLAVA_PATCHES, lognormal_counts(rng), np.full(IMAGES, 60)
    config = tiny_config(width + (run is score))
    capacity = prumerge.preset("prumerge").capacity_for(patches)
    engine = DrawnCounts(
        *nnx.split(random_llava(config)),
        config,
        prumerge.preset("prumerge", capacity=capacity),
        fitted("prumerge", patches, text_tokens),
        dtype=jnp.dtype(jnp.float32),
    )
    engine.counts = np.rint(counts).astype(np.int32)
    side = config.vision.image_size
    queries = []
    for key, tokens in enumerate(text_tokens.tolist()):
        text = rng.integers(3, 32, tokens).astype(np.int32)
        pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
        query = Query(key, np.insert(text, 1, IMAGE_TOKEN), pixels, max_new_tokens=2)
        if run is score:  # the last token of the text is the continuation
            query = query._replace(
                token_ids=query.token_ids[:-1], continuation=text[-1:], max_new_tokens=0
            )
        queries.append(query)

    compiled.clear()
    results = {result.key: result for result in run(engine, queries)}
    assert len(results) == IMAGES
    assert not any(result.error for result in results.values())
    visual = np.array([results[key].visual_tokens for key in range(IMAGES)])
    np.testing.assert_array_equal(visual, engine.counts)
    for stage in STAGES[run]:
        assert compiled[f"jit({stage})"] == 1, stage
    real, computed = engine.counters.real_tokens, engine.counters.row_tokens
    assert real == engine.counts.sum() + text_tokens.sum()
    assert real / computed >= 0.95, f"{real} real of {computed} computed tokens"
