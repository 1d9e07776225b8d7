"""LLaVA-OneVision's images through the engine against transformers: shrunk mosaics, no CLS."""

import functools
import hashlib
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from prumerge_jax.data.images import ImageError, OneOfSeveral, Video, normalize
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.engine.request import ImageInput, Request, SamplingParams, SequenceLogits
from tests.families import GoldenModel, engine_of, golden_model

pytestmark = pytest.mark.usefixtures("reference_forms")
load = functools.partial(golden_model, name="onevision_tied")


def images(model: GoldenModel) -> list[str]:
    return [case for case in model.cases if case.startswith("image/")]


def test_tiles_are_the_references(golden: pathlib.Path):
    model = load(golden)
    for case in images(model):
        facts, picture = model.cases[case], model.processor(model.image(case.split("/")[1]))
        assert [side * 48 for side in picture.layout.tiles] == facts["best_resolution_hw"][0]
        assert picture.layout.span == facts["image_tokens"][0]
        sha256 = hashlib.sha256(picture.crops.tobytes()).hexdigest()
        assert sha256 == facts["sha256_uint8_hwc"][0]
        pixels = normalize(picture.crops, *[(0.5,) * 3] * 2)
        chw = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        assert hashlib.sha256(chw.tobytes()).hexdigest() == facts["sha256_float32_chw"][0]


def check(model: GoldenModel, cases: list[str], requests: list[Request]) -> None:
    """Logits and greedy tokens against the golden ones."""
    engine = engine_of(model, "full")
    logits: dict[int, np.ndarray] = {}
    for result in engine.logits(requests):
        assert isinstance(result, SequenceLogits), result
        logits[result.key] = result.values
    answers = {answer.key: answer for answer in engine.generate(requests)}
    for key, case in enumerate(cases):
        positions = model.arrays[f"{case}/positions"]
        assert len(logits[key]) == len(model.arrays[f"{case}/input_ids"])
        np.testing.assert_allclose(
            logits[key][positions], model.arrays[f"{case}/logits"], atol=2e-4, rtol=2e-4
        )
        assert answers[key].token_ids == tuple(model.arrays[f"{case}/greedy"].tolist()), case


def test_logits_and_greedy_tokens_are_transformers(golden: pathlib.Path):
    model = load(golden)
    cases = images(model)
    check(model, cases, [model.request(key, case) for key, case in enumerate(cases)])


def test_several_images_of_a_prompt_are_not_cut(golden: pathlib.Path):
    model = load(golden)
    facts = model.cases["multi/three"]
    pictures = [model.processor(OneOfSeveral(model.image(name))) for name in facts["images"]]
    for picture, sha256, count in zip(
        pictures, facts["sha256_uint8_hwc"], facts["image_tokens"], strict=True
    ):
        assert hashlib.sha256(picture.crops.tobytes()).hexdigest() == sha256
        assert picture.layout.span == count
    inputs = tuple(ImageInput(*picture) for picture in pictures)
    ids = model.arrays["multi/three/input_ids"]
    places = np.flatnonzero((ids == 250) & (np.append(0, ids[:-1]) != 250))
    spans = [picture.layout.span for picture in pictures]
    if len(places) == 1:  # the images stand next to each other
        places = places[0] + np.concatenate([[0], np.cumsum(spans)[:-1]])
    keep = np.ones(len(ids), bool)
    for place, span in zip(places, spans, strict=True):
        keep[place + 1 : place + span] = False
    ids = np.where(ids == 250, IMAGE_TOKEN, ids)[keep].astype(np.int32)
    request = Request(1, ids, inputs, sampling=SamplingParams(max_new_tokens=8))
    case = images(model)[2]
    check(model, [case, "multi/three"], [model.request(0, case), request])


def golden_video(model: GoldenModel, name: str, count: int) -> Video:
    """A window of 60 % of a picture that moves from the left upper to the right lower corner."""
    picture = Image.open(model.image(name)).convert("RGB")
    size = int(picture.width * 0.6), int(picture.height * 0.6)
    room = picture.width - size[0], picture.height - size[1]
    frames = []
    for frame in range(count):
        left, top = (side * frame // (count - 1) for side in room)
        frames.append(picture.crop((left, top, left + size[0], top + size[1])))
    return Video(frames)


def test_videos_alone_and_beside_an_image_are_transformers(golden: pathlib.Path):
    model = load(golden)
    requests = []
    for key, case in enumerate(("video/five", "mixed/image_video")):
        facts = model.cases[case]
        picture = model.processor(golden_video(model, *facts["video"]))
        sha256 = hashlib.sha256(picture.crops.tobytes()).hexdigest()
        assert sha256 == facts["video_sha256_uint8_hwc"]
        assert picture.layout.span == facts["video_tokens"]
        video = ImageInput(*picture)
        ids = model.arrays[f"{case}/input_ids"]
        is_visual = (ids == 250) | (ids == 251)
        first = is_visual & (ids != np.append(0, ids[:-1]))
        token_ids = np.where(is_visual, IMAGE_TOKEN, ids)[~is_visual | first].astype(np.int32)
        inputs = {251: video}
        if "images" in facts:
            inputs[250] = ImageInput(*model.processor(model.image(facts["images"][0])))
        in_order = tuple(inputs[number] for number in ids[first])
        sampling = SamplingParams(max_new_tokens=8)
        requests.append(Request(key, token_ids, in_order, sampling=sampling))
    check(model, ["video/five", "mixed/image_video"], requests)


def test_videos_that_cannot_be_shown_are_said_in_a_line(golden: pathlib.Path):
    model = load(golden)
    small, large = (np.zeros((side, 20, 3), np.uint8) for side in (20, 30))
    for frames, message in (
        ([], "my video: no frames; expected at least one"),
        ([small, large], "frame 1 of my video has 20 x 30 pixels; expected all frames"),
        ([small, b""], "frame 1 of my video: the file is empty"),
    ):
        with pytest.raises(ImageError, match=message):
            model.processor(Video(frames), "my video")
    next_model = GoldenModel(golden, "next_vicuna")
    with pytest.raises(ImageError, match="my video: a video; the model takes images alone"):
        next_model.processor(Video([small]), "my video")


def test_pruned_tokens_are_crop_by_crop(golden: pathlib.Path):
    """Without interpolation; every kept token is a patch that lies on the image."""
    model = load(golden)
    requests = [model.request(key, case) for key, case in enumerate(images(model)[:4])]
    engine = engine_of(model, "select-only")
    for window in engine.planner(engine.counters).windows([requests]):
        assert all(rows.taps is None for rows in window.batches)
        for planned, request in zip(window.planned, window.requests, strict=True):
            (image,) = request.images
            assert 0 < len(planned.runs[0]) <= image.layout.on_image().sum()
            assert jax.numpy.isfinite(window.pool).all()
