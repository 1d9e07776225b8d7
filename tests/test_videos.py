"""Videos through `Llava`: prompts, logits, explanations, and shapes that fit them."""

import dataclasses
import pathlib

import numpy as np
import pytest
from PIL import Image

import prumerge_jax
from prumerge_jax.data.images import ImageError
from tests.tiny_llava import CONFIG, write_tiny_llava

pytestmark = pytest.mark.slow

VIDEO = dataclasses.replace(
    CONFIG, family="video_llava", video_tower=True, chat_template="llava_v1"
)
PATCHES = CONFIG.vision.num_patches


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> prumerge_jax.Llava:
    return prumerge_jax.Llava.load(write_tiny_llava(tmp_path_factory.mktemp("video") / "m", VIDEO))


def frames(count: int) -> prumerge_jax.Video:
    rng = np.random.default_rng(count)
    return prumerge_jax.Video([rng.integers(0, 256, (20, 30, 3), np.uint8) for _ in range(count)])


def test_an_image_and_a_video_of_one_prompt(
    model: prumerge_jax.Llava, tmp_path: pathlib.Path
) -> None:
    image = np.full((30, 40, 3), 90, np.uint8)
    (together,) = model.logits([(image, frames(3))], [[1, -200, 5, -200, 6]])
    assert len(together) == 3 + PATCHES + 3 * (PATCHES + 1)
    (alone,) = model.logits([image], [[1, -200, 5]])
    np.testing.assert_allclose(together[: PATCHES + 2], alone, atol=2e-4)
    first = frames(10).frames[0]
    Image.fromarray(first).save(tmp_path / "0.png")
    asked = [prumerge_jax.VideoFile(tmp_path), prumerge_jax.Video([first] * 8), image]
    answers = model.generate(asked, ["What is this?"] * 3, reduction="full", max_new_tokens=4)
    assert answers[0] == answers[1]
    with pytest.raises(ImageError, match="image 0 .*: no such file or folder; expected a video"):
        model.generate([prumerge_jax.VideoFile(tmp_path / "none")], ["What is this?"])


def test_batches_hold_whole_videos_that_are_merged_over_time(model: prumerge_jax.Llava) -> None:
    reduction = "prumerge:temporal=0.5,min_tokens=0"
    still = prumerge_jax.Video([frames(1).frames[0]] * 20)
    asked = ([still, frames(20)], ["What is this?"] * 2)
    builder = model._builder(None, None, reduction)
    engine = model.engine(reduction, builder.drafts(*asked))
    assert engine.shapes.batch_size >= 20
    usage = [
        a.usage.visual_tokens for a in engine.generate(builder.requests(builder.drafts(*asked)))
    ]
    one, *others = model.explain_crops(still, reduction=reduction)
    assert len(one.patch_indices)
    assert [len(frame.patch_indices) for frame in others] == [0] * 19
    assert min(usage) == len(one.patch_indices) + 1  # of the first frame, and its extra token
