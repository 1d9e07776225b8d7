"""Chosen lengths, and what the default shapes cost over two thousand images."""

import collections
import pathlib
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from prumerge_jax import reductions
from prumerge_jax.data import filling
from prumerge_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from prumerge_jax.data.templates import TEMPLATES
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.digits import questions as digits_questions
from prumerge_jax.digits import tokenizer as digits_tokenizer
from prumerge_jax.engine.encoding import EncodedImages, Encoder, Encoding, PlacedModel
from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.request import Answer, ImageInput, Opening, Request, SamplingParams
from prumerge_jax.engine.shapes import (
    EVALUATION_SIZES,
    EngineConfig,
    EngineShapes,
    fit,
    row_length_for_fixed_counts,
)
from prumerge_jax.models.config import LlavaConfig, TextConfig, VisionConfig
from tests.prompts import evaluation_prompt
from tests.tiny_llava import random_llava

IMAGES = 2000
LLAVA_PATCHES, DIGITS_PATCHES = 576, 144
STAGES = {
    Engine.score: ("encode", "join", "hidden_before_last_mlp", "log_likelihoods"),
    Engine.generate: ("encode", "join", "prefill", "first_tokens", "seat", "decode"),
}


def openings(text_tokens: Iterable[int], images: Iterable[int] | None = None) -> list[Opening]:
    """Requests of so many text tokens, the image in front; by default they share nothing."""
    texts = list(text_tokens)
    names = range(len(texts)) if images is None else images
    rng = np.random.default_rng(0)
    return [
        Opening(np.append(IMAGE_TOKEN, rng.integers(1, 30_000, count)), (name,))
        for count, name in zip(texts, names, strict=True)
    ]


def fitted(reduction: str, patches: int, text_tokens: np.ndarray, **fields: int) -> EngineShapes:
    return fit(
        EngineConfig(**fields),
        reductions.parse(reduction),
        patches,
        openings(text_tokens),
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


def test_rows_hold_the_questions_about_an_image() -> None:
    text, images = np.full(360, 60), np.arange(360) // 18
    rows = {}
    for name in ("full", "prumerge+", "prumerge"):
        for share in (True, False):
            rows[name, share] = fit(
                EngineConfig(share_prefixes=share),
                reductions.parse(name),
                LLAVA_PATCHES,
                openings(text, images),
                max_positions=4096,
            )
    # 576 + 18 * 60 tokens: one image with all its questions in a row, or the next row takes more.
    assert rows["full", True].row_length >= 1664
    assert rows["prumerge", True].row_length == rows["prumerge+", True].row_length == 2048
    assert rows["full", False].row_length == 640
    assert {shapes.prefill_rows for shapes in rows.values()} == {4}
    few = fit(
        EngineConfig(),
        reductions.parse("prumerge"),
        LLAVA_PATCHES,
        openings(np.full(6, 20), [0] * 6),
        max_positions=4096,
    )
    assert (few.row_length, few.prefill_rows) == (384, 1)


def test_sizes_nobody_set_fit_the_mesh() -> None:
    for defaults in (EngineConfig().defaults, EVALUATION_SIZES):
        config = EngineConfig(defaults=defaults)
        assert config.sizes(1) == defaults
        for shards in (2, 3, 8, 24):
            sizes = config.sizes(shards)
            for name in ("batch_size", "prefill_rows", "slots"):
                least = getattr(defaults, name)
                assert getattr(sizes, name) == -(-least // shards) * shards
            assert sizes.window_size >= defaults.window_size
            assert sizes.window_size % sizes.batch_size == 0
    assert EngineConfig(window_size=24).sizes(8).batch_size == 8
    assert EngineConfig(window_size=24, defaults=EVALUATION_SIZES).sizes(8).batch_size == 24
    assert EngineConfig(batch_size=48).sizes(8).window_size == 96


@pytest.mark.parametrize(
    ("fields", "shards", "message"),
    [
        ({"prefill_rows": 2}, 8, "prefill_rows 2 does not divide over the 8 data shards .*"
         "set --config.engine.prefill_rows to a multiple of 8"),
        ({"slots": 12}, 8, "--config.engine.slots"),
        ({"batch_size": 4}, 8, "--config.engine.batch_size"),
        ({"window_size": 12}, 8, "--config.engine.window_size"),
        ({"window_size": 12, "batch_size": 8}, 1, "window_size 12 is not a multiple of batch_size"),
        ({"slots": 0}, 1, "slots is 0; expected at least 1"),
        ({"row_length": -1}, 1, "row_length is -1; expected at least 1"),
    ],
)  # fmt: skip
def test_sizes_that_were_set_and_do_not_fit_are_named(
    fields: dict[str, int], shards: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**fields).sizes(shards)


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
        reduction = reductions.parse(f"{name}:capacity={capacity}")
        most = reductions.parse(name).capacity_for(DIGITS_PATCHES)
        shapes = fit(
            EngineConfig(), reduction, DIGITS_PATCHES, openings(lengths), max_positions=4096
        )
        assert text.max() + most <= shapes.longest_prompt <= shapes.row_length
        assert text.max() + most <= shapes.cache_length
        assert shapes.row_length % 128 == 0

    def computed(row_length: int) -> int:
        return row_length * len(filling.fill_rows(lengths, row_length))

    chosen = row_length_for_fixed_counts(text)
    for row_length in range(-(-text.max() // 128) * 128, 2 * text.max(), 128):
        assert computed(chosen) <= computed(row_length)


def digits_counts(rng: np.random.Generator) -> np.ndarray:
    """The distribution measured on the digits' test images: mean 24, 5/50/95 % 15/25/31."""
    return np.interp(rng.random(IMAGES), [0, 0.05, 0.5, 0.95, 1], [8, 15, 25, 31, 37])


def digits_text(tmp_path: pathlib.Path) -> np.ndarray:
    """Tokens of the prompts of `digits_vqa`, without the image."""
    path = tmp_path / "tokenizer.model"
    path.write_bytes(digits_tokenizer.build_for_digits())
    tokenizer = SentencePieceTokenizer(path)
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


class DrawnCounts(Encoder):
    """An encoder that takes the visual tokens of request i to be `counts[i]`."""

    counts: np.ndarray

    def measure(self, encoding: Encoding) -> EncodedImages:
        images = super().measure(encoding)
        lengths = images.lengths.copy()
        for number, request in enumerate(encoding.places.requests):
            lengths[number % len(lengths), number // len(lengths)] = self.counts[request.key]
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
        eos_token_ids=(),
    )  # fmt: skip


@pytest.fixture
def compiled() -> Iterator[collections.Counter[str]]:
    """How often each function has been compiled since the test began."""
    counter: collections.Counter[str] = collections.Counter()

    def heard(event: str, duration: float, **fields: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            counter[str(fields["fun_name"])] += 1

    jax.monitoring.register_event_duration_secs_listener(heard)
    yield counter
    jax.monitoring.unregister_event_duration_listener(heard)


@pytest.mark.slow
@pytest.mark.usefixtures("no_compilation_cache")
@pytest.mark.parametrize(
    ("run", "kind", "width"),
    [(Engine.score, "digits", 6), (Engine.score, "lognormal", 10), (Engine.generate, "digits", 6)],
)
def test_two_thousand_images_compile_once_and_waste_less_than_a_twentieth(
    run: Callable[[Engine, list[Request]], Iterator[Answer]],
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
    config = tiny_config(width + (run is Engine.score))
    capacity = reductions.parse("prumerge").capacity_for(patches)
    model = PlacedModel(*nnx.split(random_llava(config)), config, jnp.dtype(jnp.float32))
    shapes = fitted("prumerge", patches, text_tokens)
    engine = Engine(model, reductions.parse(f"prumerge:capacity={capacity}"), shapes)
    engine.encoder = encoder = DrawnCounts(model, shapes)
    encoder.counts = np.rint(counts).astype(np.int32)
    side = config.vision.image_size
    requests = []
    for key, tokens in enumerate(text_tokens.tolist()):
        text = rng.integers(3, 32, tokens).astype(np.int32)
        image = ImageInput(rng.integers(0, 256, (1, side, side, 3), np.uint8))
        token_ids, continuation = np.insert(text, 1, IMAGE_TOKEN), text[:0]
        if run is Engine.score:  # the last token of the text is the continuation
            token_ids, continuation = token_ids[:-1], text[-1:]
        sampling = SamplingParams(max_new_tokens=2)
        requests.append(Request(key, token_ids, (image,), continuation, sampling))

    jax.clear_caches()  # what other tests compiled counts as compiled
    compiled.clear()
    results = {answer.key: answer for answer in run(engine, requests)}
    assert len(results) == IMAGES
    assert not any(answer.error for answer in results.values())
    assert (engine.counters.requests, engine.counters.images) == (IMAGES, IMAGES)
    visual = np.array([results[key].usage.visual_tokens for key in range(IMAGES)])
    np.testing.assert_array_equal(visual, encoder.counts)
    for stage in STAGES[run]:
        assert compiled[f"jit({stage})"] == 1, stage
    real, computed = engine.counters.real_tokens, engine.counters.row_tokens
    assert real == encoder.counts.sum() + text_tokens.sum()
    assert real / computed >= 0.95, f"{real} real of {computed} computed tokens"
