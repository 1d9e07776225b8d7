"""Video-LLaVA's images and videos through the engine against transformers, whole and reduced."""

import functools
import hashlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from prumerge_jax import reductions, sharding
from prumerge_jax.data.images import Video
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.request import ImageInput, Request, SamplingParams, SequenceLogits
from prumerge_jax.models.frames import FrameForm
from prumerge_jax.models.llava import encode_images, gather_evidence
from prumerge_jax.reductions.temporal import Merged, merge_frames, similarity
from tests.conftest import require_eight_devices
from tests.families import GoldenModel, engine_of, engine_on, golden_model

STEPS = (0, 0, 1, 2, 2, 2, 5, 7)


pytestmark = pytest.mark.usefixtures("reference_forms")
load = functools.partial(golden_model, name="video_llava")


def golden_video(model: GoldenModel, name: str, count: int) -> Video:
    """A window of 60 % of a picture that moves from the left upper to the right lower corner."""
    picture = Image.open(model.image(name)).convert("RGB")
    size = int(picture.width * 0.6), int(picture.height * 0.6)
    frames = []
    for step in STEPS[:count]:
        left, top = (
            (whole - part) * step // 7 for whole, part in zip(picture.size, size, strict=True)
        )
        frames.append(picture.crop((left, top, left + size[0], top + size[1])))
    return Video(frames)


def request(model: GoldenModel, key: int, case: str) -> Request:
    """The request of a case; its image's and its video's pixels are the golden ones."""
    facts, inputs = model.cases[case], {}
    if "images" in facts:
        picture = model.processor(model.image(facts["images"][0]))
        assert picture.layout.span == facts["image_tokens"]
        sha256 = hashlib.sha256(picture.crops.tobytes()).hexdigest()
        assert sha256 == facts["sha256_uint8_hwc"]
        inputs[250] = ImageInput(*picture, key=f"{case} image")
    if "video" in facts:
        picture = model.processor(golden_video(model, *facts["video"]))
        assert picture.layout.span == facts["video_tokens"]
        sha256 = hashlib.sha256(picture.crops.tobytes()).hexdigest()
        assert sha256 == facts["video_sha256_uint8_hwc"]
        inputs[251] = ImageInput(*picture, key=f"{case} video")
    ids = model.arrays[f"{case}/input_ids"]
    is_visual = (ids == 250) | (ids == 251)
    first = is_visual & (ids != np.append(0, ids[:-1]))
    token_ids = np.where(is_visual, IMAGE_TOKEN, ids)[~is_visual | first].astype(np.int32)
    in_order = tuple(inputs[number] for number in ids[first])
    return Request(key, token_ids, in_order, sampling=SamplingParams(max_new_tokens=8))


def requests(model: GoldenModel) -> list[Request]:
    return [request(model, key, case) for key, case in enumerate(model.cases)]


def logits_of(engine: Engine, requests: list[Request]) -> dict[int, np.ndarray]:
    found = {}
    for result in engine.logits(requests):
        assert isinstance(result, SequenceLogits), result
        found[result.key] = result.values
    return found


@pytest.mark.slow
def test_logits_and_greedy_tokens_are_transformers(golden: pathlib.Path):
    model = load(golden)
    engine, asked = engine_of(model, "full"), requests(model)
    logits = logits_of(engine, asked)
    answers = {answer.key: answer for answer in engine.generate(asked)}
    alone = engine_of(model, "full", window_size=16)
    (last,) = alone.generate(asked[-1:])
    assert last.token_ids == answers[len(asked) - 1].token_ids
    for key, case in enumerate(model.cases):
        positions = model.arrays[f"{case}/positions"]
        assert len(logits[key]) == len(model.arrays[f"{case}/input_ids"])
        np.testing.assert_allclose(
            logits[key][positions], model.arrays[f"{case}/logits"], atol=2e-4, rtol=2e-4
        )
        assert answers[key].token_ids == tuple(model.arrays[f"{case}/greedy"].tolist()), case


@pytest.mark.slow
def test_both_towers_and_the_merge_over_time_are_the_references(golden: pathlib.Path):
    model = load(golden)
    reduction = reductions.parse("select-only:temporal=0.8,min_tokens=0")
    towers = {"image": model.model.vision, "video": model.model.video_tower}

    @functools.partial(jax.jit, static_argnames="kind")
    def seen(pixels: jax.Array, kind: str) -> tuple[reductions.Evidence, Merged, jax.Array]:
        first = jnp.arange(len(pixels)) == 0
        found = gather_evidence(
            towers[kind],
            pixels,
            reduction,
            dtype=jnp.dtype(jnp.float32),
            first_frame=first,
            form=FrameForm(cls=True),
        )
        merged = merge_frames(found.hidden, found.keys, found.attention, first, 0.8)
        return found, merged, reductions.reduce(found, reduction).patch_indices

    for key, case in enumerate(model.cases):
        for image in request(model, key, case).images:
            kind, frames = "video" if image.layout.frames else "image", len(image.crops)
            expected = {
                name.rpartition("/")[2]: model.arrays[name]
                for name in model.arrays
                if name.startswith((f"{case}/{kind}_", f"{case}/temporal_"))
            }
            found, merged, patches = seen(jnp.asarray(image.crops), kind)
            hidden = np.concatenate([found.cls[:, None], found.hidden], axis=1)
            for got, want in (
                (found.attention, expected[f"{kind}_cls_attention"]),
                (hidden, expected[f"{kind}_hidden"]),
                (found.keys, expected[f"{kind}_keys"][:, 1:]),
            ):
                np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5, err_msg=case)
            if kind == "image":
                continue
            likeness = similarity(found.hidden)[1:frames]
            np.testing.assert_allclose(likeness, expected["temporal_similarity"], atol=1e-5)
            for name in ("fresh", "length"):
                got = getattr(merged, name)
                np.testing.assert_array_equal(got, expected[f"temporal_{name}"])
            is_fresh = expected["temporal_fresh"]
            for name in ("hidden", "keys"):
                got, want = getattr(merged, name), expected[f"temporal_{name}"]
                np.testing.assert_allclose(
                    got * is_fresh[..., None], want * is_fresh[..., None], atol=1e-5, rtol=1e-5
                )
            np.testing.assert_allclose(merged.attention, expected["temporal_attention"], atol=1e-5)
            is_kept = (np.asarray(patches)[..., None] == np.arange(is_fresh.shape[1])).any(1)
            np.testing.assert_array_equal(is_kept, expected["temporal_keep"])


def tokens_of(engine: Engine, request: Request) -> tuple[np.ndarray, np.ndarray]:
    """Visual tokens [n, Dv] of a request's last image and the offset of each."""
    (window,) = engine.planner(engine.counters).windows([[request]])
    assert not window.failed, window.failed
    run = window.planned[0].runs[-1]
    pool = np.asarray(window.pool)
    return pool.reshape(-1, pool.shape[-1])[run.index], run.offset


@pytest.mark.slow
def test_every_frame_is_reduced_by_itself(golden: pathlib.Path):
    model = load(golden)
    asked = request(model, 0, "mixed/image_video")
    video = asked.images[-1]
    encode = jax.jit(encode_images, static_argnames="reduction")
    visual = encode(model.model.video_tower, video.crops, reduction="prumerge")
    lengths = np.asarray(visual.lengths)
    expected = np.concatenate(
        [np.asarray(visual.tokens)[frame, :n] for frame, n in enumerate(lengths)]
    )
    tokens, offset = tokens_of(engine_of(model, "prumerge"), asked)
    np.testing.assert_allclose(tokens, expected, atol=1e-5, rtol=1e-5)
    frame = np.repeat(np.arange(8), lengths)
    assert (offset // 17 == frame).all()
    assert (offset % 17 > 0).all()  # the first position of a frame is CLS's
    with_cls, positions = tokens_of(engine_of(model, "prumerge:keep_cls=True"), asked)
    is_cls = positions % 17 == 0
    assert is_cls.sum() == 8
    np.testing.assert_allclose(with_cls[~is_cls], expected, atol=1e-5, rtol=1e-5)
    hidden = model.arrays["mixed/image_video/video_hidden"][:, 0]
    np.testing.assert_allclose(with_cls[is_cls], hidden, atol=1e-4, rtol=1e-4)
    few, _ = tokens_of(engine_of(model, "prumerge", image_budget=5), asked)
    assert len(few) == 5 + 8  # and an extra token of each frame


@pytest.mark.slow
def test_merging_over_time_ends_with_the_video(golden: pathlib.Path):
    """In any company and at any place of a batch; above 1 nothing is merged."""
    model = load(golden)
    asked = requests(model)
    engine = engine_of(model, "prumerge+:temporal=0.8", batch_size=16, window_size=32)
    together = logits_of(engine, asked[2:4] + asked[4:])
    alone = logits_of(engine, asked[3:4])
    np.testing.assert_allclose(together[3], alone[3], atol=2e-5, rtol=2e-5)
    per_frame, _ = tokens_of(engine_of(model, "prumerge+"), asked[2])
    merged, _ = tokens_of(engine, asked[2])
    assert 0 < len(merged) < len(per_frame)
    unmerged, _ = tokens_of(engine_of(model, "prumerge+:temporal=1.5"), asked[2])
    np.testing.assert_array_equal(unmerged, per_frame)


@pytest.mark.slow
def test_a_mesh_equals_one_device(golden: pathlib.Path):
    require_eight_devices()
    model, reduction = load(golden), "prumerge:temporal=0.8"
    asked = requests(model)
    plain = engine_of(model, reduction, batch_size=16, window_size=32)
    expected = logits_of(plain, asked)
    mesh = sharding.make_mesh(2, 2, 2)
    engine = engine_on(mesh, plain, batch_size=32, window_size=64, prefill_rows=4)
    with sharding.use_mesh(mesh):
        got = logits_of(engine, asked)
    for key, values in expected.items():
        np.testing.assert_allclose(got[key], values, atol=5e-5, rtol=5e-5)


def test_videos_that_no_window_holds_are_refused_with_the_number(golden: pathlib.Path):
    model = load(golden)
    asked = request(model, 0, "mixed/image_video")
    for reduction, sizes, message in (
        ("prumerge", {"batch_size": 4, "window_size": 8}, "window_size to at least 9"),
        ("prumerge", {"batch_size": 12, "window_size": 12}, "window_size to at least 24"),
        (
            "prumerge:temporal=0.8",
            {"batch_size": 4, "window_size": 16},
            "a video has 8 frames that are merged over time, a batch has room for 4; set "
            "--config.engine.batch_size to at least 8",
        ),
    ):
        (answer,) = engine_of(model, reduction, **sizes).generate([asked])
        assert answer.error is not None
        assert answer.error.endswith(message)


def test_a_frame_that_is_not_finite_leaves_the_others_alone():
    hidden = np.ones((3, 4, 2), np.float32)
    hidden[1] = np.nan
    attention = np.full((3, 4), 0.2, np.float32)
    first = np.arange(3) == 0
    merged = merge_frames(*map(jnp.asarray, (hidden, hidden, attention, first)), 0.8)
    assert np.isfinite(np.asarray(merged.hidden)[[0, 2]]).all()
    assert np.asarray(merged.fresh).all()
