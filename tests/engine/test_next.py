"""LLaVA-NeXT through the engine against transformers: tiles, unpadding, newlines, pruning."""

import dataclasses
import functools
import hashlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prumerge_jax import prumerge, reductions, sharding
from prumerge_jax.data.images import normalize
from prumerge_jax.engine.encoding import EncodedImages, Encoder, Encoding
from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.request import (
    Answer,
    ImageInput,
    Request,
    SamplingParams,
    SequenceLogits,
)
from prumerge_jax.engine.shapes import EngineShapes
from prumerge_jax.models.llava import encode_images, gather_evidence
from tests.conftest import require_eight_devices
from tests.families import GoldenModel, engine_of, engine_on, golden_model

SHAPES = EngineShapes(
    batch_size=4,
    window_size=16,
    row_length=128,
    longest_prompt=128,
    prefill_rows=2,
    slots=4,
    cache_length=128,
    decode_steps_per_call=4,
)
NEXT = ("next_vicuna", pytest.param("next_mistral", marks=pytest.mark.slow))


pytestmark = pytest.mark.usefixtures("reference_forms")
make_engine = functools.partial(engine_of, base=SHAPES)


def logits_of(engine: Engine, requests: list) -> dict[int, np.ndarray]:
    found = {}
    for result in engine.logits(requests):
        assert isinstance(result, SequenceLogits), result
        found[result.key] = result.values
    return found


@pytest.mark.parametrize("name", NEXT)
def test_tiles_are_the_references(golden: pathlib.Path, name: str):
    model = golden_model(golden, name)
    for case, facts in model.cases.items():
        picture = model.processor(model.image(case))
        layout = picture.layout
        assert list(layout.tiles) == facts["grid"]
        assert [layout.window.top, layout.window.bottom] == facts["unpad_rows"]
        assert [layout.window.left, layout.window.right] == facts["unpad_cols"]
        assert (layout.num_crops, layout.span) == (facts["crops"], facts["image_tokens"])
        sha256 = hashlib.sha256(picture.crops.tobytes()).hexdigest()
        assert sha256 == facts["sha256_uint8_hwc"]
        chw = np.ascontiguousarray(normalize(picture.crops).transpose(0, 3, 1, 2))
        assert hashlib.sha256(chw.tobytes()).hexdigest() == facts["sha256_float32_chw"]
        np.testing.assert_array_equal(layout.on_image(), model.arrays[f"{case}/valid"])


@pytest.mark.parametrize("name", NEXT)
def test_logits_and_greedy_tokens_are_transformers(golden: pathlib.Path, name: str):
    """All images through one engine, several to a row and a window."""
    model = golden_model(golden, name)
    requests = [model.request(key, case) for key, case in enumerate(model.cases)]
    engine = make_engine(model, "full")
    logits = logits_of(engine, requests)
    answers = {answer.key: answer for answer in engine.generate(requests)}
    for key, case in enumerate(model.cases):
        expected = {what: model.arrays[f"{case}/{what}"] for what in ("positions", "logits")}
        assert len(logits[key]) == len(model.arrays[f"{case}/input_ids"])
        np.testing.assert_allclose(
            logits[key][expected["positions"]], expected["logits"], atol=2e-4, rtol=2e-4
        )
        assert answers[key].token_ids == tuple(model.arrays[f"{case}/greedy"].tolist()), case
        assert answers[key].usage.visual_tokens == model.cases[case]["image_tokens"]
    assert engine.counters.crops == 2 * sum(case["crops"] for case in model.cases.values())


def test_visual_features_are_transformers(golden: pathlib.Path):
    """What the decoder receives in place of an image: projected tokens and newlines."""
    model = golden_model(golden, "next_vicuna")
    requests = [model.request(key, case) for key, case in enumerate(model.cases)]
    engine = make_engine(model, "full")
    seen = set()
    for window in engine.planner(engine.counters).windows([requests]):
        for rows in window.batches:
            x = model.model.embed_rows(
                *(jnp.asarray(a) for a in (rows.ids, window.pool, rows.visual_index))
            )
            for place, request in enumerate(rows.requests):
                case = list(model.cases)[window.requests[request].key]
                positions = rows.positions_of(place)
                is_visual = rows.visual_index.reshape(-1)[positions] != -1
                got = np.asarray(x).reshape(-1, x.shape[-1])[positions[is_visual]]
                expected = model.arrays[f"{case}/visual"]
                np.testing.assert_allclose(got, expected, atol=2e-4, rtol=2e-4)
                seen.add(case)
    assert seen == set(model.cases)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["next_vicuna", "next_mistral"])
def test_attention_and_outliers_of_every_crop_are_the_references(golden: pathlib.Path, name: str):
    model = golden_model(golden, name)
    reduction = reductions.parse("prumerge")

    @jax.jit
    def evidence(pixels: jax.Array) -> jax.Array:
        return gather_evidence(
            model.model.vision, pixels, reduction, dtype=jnp.dtype(jnp.float32)
        ).attention

    for case in model.cases:
        picture = model.processor(model.image(case))
        pixels = np.zeros((5, *picture.crops.shape[1:]), np.uint8)
        pixels[: len(picture.crops)] = picture.crops
        attention = evidence(jnp.asarray(pixels))[: len(picture.crops)]
        np.testing.assert_allclose(
            attention, model.arrays[f"{case}/cls_attention"], atol=1e-5, rtol=0
        )
        config = prumerge.preset("select-only", min_tokens=0)
        for mask, present in (
            ("iqr_keep", None),
            ("iqr_keep_valid", jnp.asarray(model.arrays[f"{case}/valid"])),
        ):
            chosen = prumerge.select(attention, config, present)
            np.testing.assert_array_equal(
                np.asarray(chosen.copies) > 0, model.arrays[f"{case}/{mask}"], err_msg=case
            )


def expected_tokens(model: GoldenModel, case: str, reduction: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [n, Dv] of a pruned image, crop by crop, and the patch of each."""
    picture = model.processor(model.image(case))
    visual = jax.jit(encode_images, static_argnames="reduction")(
        model.model.vision,
        picture.crops,
        reduction=reduction,
        present=picture.layout.on_image(),
    )
    lengths = np.asarray(visual.lengths)
    tokens = [np.asarray(visual.tokens)[crop, :n] for crop, n in enumerate(lengths)]
    patches = [np.asarray(visual.patch_indices)[crop, :n] for crop, n in enumerate(lengths)]
    return np.concatenate(tokens), np.concatenate(patches)


@pytest.mark.slow
def test_pruned_crops_follow_each_other(golden: pathlib.Path):
    """In packed rows among other images, as crop by crop alone."""
    model = golden_model(golden, "next_vicuna")
    cases = ["wide_97x61", "line_260x3", "wide_333x77", "small_tall_20x47", "tall_41x200"]
    requests = [model.request(key, case) for key, case in enumerate(cases)]
    engine = make_engine(model, "prumerge")
    compared = set()
    for window in engine.planner(engine.counters).windows([requests]):
        pool = np.asarray(window.pool).reshape(-1, model.config.vision.width)
        for planned, request in zip(window.planned, window.requests, strict=True):
            if request.key in (0, 1):
                expected, _ = expected_tokens(model, cases[request.key], "prumerge")
                (run,) = planned.runs
                np.testing.assert_allclose(pool[run.index], expected, atol=1e-5, rtol=1e-5)
                compared.add(request.key)
    assert compared == {0, 1}


@pytest.mark.slow
def test_pruned_alone_equals_pruned_in_company(golden: pathlib.Path):
    model = golden_model(golden, "next_vicuna")
    cases = list(model.cases)
    requests = [model.request(key, case) for key, case in enumerate(cases)]
    together = logits_of(make_engine(model, "prumerge+"), requests)
    small = make_engine(model, "prumerge+", batch_size=2, window_size=6)
    in_small_windows = logits_of(small, requests)
    for request in requests:
        np.testing.assert_allclose(
            together[request.key], in_small_windows[request.key], atol=2e-5, rtol=2e-5
        )
    alone = logits_of(small, requests[3:4])
    np.testing.assert_allclose(together[3], alone[3], atol=2e-5, rtol=2e-5)


def test_more_crops_than_a_window_are_refused_with_the_number(golden: pathlib.Path):
    model = golden_model(golden, "next_vicuna")
    requests = [model.request(key, case) for key, case in enumerate(["square_56", "wide_97x61"])]
    engine = make_engine(model, "prumerge", batch_size=4, window_size=4)
    answers = {answer.key: answer for answer in engine.generate(requests)}
    assert answers[0].error is None
    assert isinstance(answers[1], Answer)
    assert answers[1].error == (
        "the images have 5 crops, a window has room for 4; set --config.engine.window_size to "
        "at least 5"
    )


def test_newlines_between_and_budgets_of_pruned_tokens(golden: pathlib.Path):
    model = golden_model(golden, "next_vicuna")
    request = model.request(0, "wide_97x61")
    found = {}
    for newlines in ("none", "row", "end"):
        engine = make_engine(model, "prumerge", newlines=newlines)
        (window,) = engine.planner(engine.counters).windows([[request]])
        found[newlines] = window.planned[0].runs[0].index
    none, row, end = found["none"], found["row"], found["end"]
    assert (none >= 0).all()
    assert end.tolist() == [*none, -2]
    assert sorted(row[row >= 0]) == sorted(none)
    assert 1 <= np.count_nonzero(row == -2) <= 8
    engine = make_engine(model, "prumerge", image_budget=7)
    (window,) = engine.planner(engine.counters).windows([[request]])
    extra_tokens = request.images[0].layout.num_crops
    assert 7 <= len(window.planned[0].runs[0]) <= 7 + extra_tokens
    with pytest.raises(ValueError, match="image_budget is 7 with the reduction full; expected"):
        make_engine(model, "full", image_budget=7)
    with pytest.raises(ValueError, match="newlines is 'some'; expected one of"):
        make_engine(model, "prumerge", newlines="some")


@pytest.mark.slow
def test_a_mesh_equals_one_device(golden: pathlib.Path):
    require_eight_devices()
    model = golden_model(golden, "next_vicuna")
    requests = [model.request(key, case) for key, case in enumerate(model.cases)]
    plain = make_engine(model, "prumerge", batch_size=4, window_size=32)
    mesh = sharding.make_mesh(2, 2, 2)
    engine = engine_on(mesh, plain, prefill_rows=4)
    expected = logits_of(plain, requests)
    with sharding.use_mesh(mesh):
        got = logits_of(engine, requests)
        answers = {answer.key: answer.token_ids for answer in engine.generate(requests)}
    for key, values in expected.items():
        np.testing.assert_allclose(got[key], values, atol=5e-5, rtol=5e-5)
    assert answers == {answer.key: answer.token_ids for answer in plain.generate(requests)}


@pytest.mark.slow
@pytest.mark.usefixtures("no_compilation_cache")
def test_nothing_compiles_after_warm_up(golden: pathlib.Path, compiled: list[str]):
    """Over 200 images of mixed sizes, and questions without one."""
    model = golden_model(golden, "next_vicuna")
    engine = make_engine(model, "prumerge")
    engine.warm_up()
    rng = np.random.default_rng(0)
    requests = []
    for key in range(200):
        height, width = rng.integers(1, 300, 2)
        picture = model.processor(rng.integers(0, 256, (height, width, 3)).astype(np.uint8))
        ids = model.token_ids("square_56") if key % 10 else np.array([1, 5, 7], np.int32)
        images = (ImageInput(*picture),) if key % 10 else ()
        requests.append(Request(key, ids, images, sampling=SamplingParams(max_new_tokens=2)))
    compiled.clear()
    answers = list(engine.generate(requests))
    assert [answer.error for answer in answers] == [None] * 200
    assert compiled == []
    assert engine.counters.images == 180
    assert engine.counters.crops > 3 * 180


def test_several_images_are_warned_of_and_too_many_tokens_refused(golden: pathlib.Path):
    model = golden_model(golden, "next_vicuna")
    with pytest.warns(UserWarning, match="prompt 0 has 2 images; LLaVA-NeXT has been trained on o"):
        model.processor.check_number(2, "prompt 0")
    request = model.request(0, "wide_97x61")
    tokens = request.text_tokens + request.images[0].layout.span
    engine = make_engine(model, "full")
    text = dataclasses.replace(model.config.text, max_positions=tokens - 1)
    engine.model = dataclasses.replace(
        engine.model, config=dataclasses.replace(model.config, text=text)
    )
    engine.encoder = Encoder(engine.model, engine.shapes)
    (answer,) = engine.generate([request])
    assert answer.error is not None
    assert f"the engine takes 128, the model {tokens - 1}. Nothing is truncated" in answer.error


class BrokenCrop(Encoder):
    """An encoder whose tower has no finite numbers for crop 2 of the window."""

    def measure(self, encoding: Encoding) -> EncodedImages:
        images = super().measure(encoding)
        required = images.required.copy()
        required[2, 0] = -1
        return images._replace(required=required)


def test_an_image_fails_as_a_whole_and_the_crop_is_named(golden: pathlib.Path):
    model = golden_model(golden, "next_vicuna")
    requests = [model.request(key, case) for key, case in enumerate(["square_56", "wide_97x61"])]
    engine = make_engine(model, "prumerge")
    engine.encoder = BrokenCrop(engine.model, engine.shapes)
    answers = {answer.key: answer for answer in engine.generate(requests)}
    assert answers[1].error is None
    assert answers[0].error == (
        "the vision tower's attention is not finite on crop 2 of the image; check the image and "
        "the weights"
    )
