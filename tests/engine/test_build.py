"""One way from a question to a request, the way of training."""

import base64
import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from prumerge_jax.data.conversation import label_mask
from prumerge_jax.data.images import ImageError, ImageMode, ImageProcessor
from prumerge_jax.data.pictures import PictureProcessor
from prumerge_jax.data.pipeline import Preprocessor
from prumerge_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from prumerge_jax.data.templates import chat_template
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.data.tokens import IGNORE, IMAGE_TOKEN
from prumerge_jax.engine.build import Draft, RequestBuilder, drafts_of_ids, named_image
from prumerge_jax.engine.request import SamplingParams
from prumerge_jax.models.config import LlavaConfig, VisionConfig
from tests.tiny_llava import tokenizer_model

MEAN = (0.5, 0.25, 0.75)  # not CLIP's
CONFIG = LlavaConfig(vision=VisionConfig(image_size=28, pixel_mean=MEAN))
QUESTIONS = ("What is this?", "How many  digits\nare there?", "2 + 2 = ?", "Ça, c'est quoi? 猫")


@pytest.fixture(scope="module", params=["4.31", "4.37"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(tokenizer_model())
    return SentencePieceTokenizer(path, request.param)


def builder_for(tokenizer: Tokenizer, conversation: str = "vicuna_v1", mode: ImageMode = "pad"):
    images = PictureProcessor(CONFIG, 28, mode)
    return RequestBuilder(tokenizer, chat_template(conversation), images)


def encoded(width: int, height: int) -> bytes:
    file = io.BytesIO()
    rng = np.random.default_rng(width)
    Image.fromarray(rng.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("conversation", ["vicuna_v1", "llava_v1"])
@pytest.mark.parametrize("has_image", [True, False])
def test_prompts_are_the_beginning_of_training_samples(
    tokenizer: Tokenizer, question: str, conversation: str, has_image: bool
) -> None:
    """Both doors: the ids in front of the answer, and the answer's ids after them."""
    value = f"<image>\n{question}" if has_image else question
    sample = {
        "id": "1",
        "conversations": [
            {"from": "human", "value": value},
            {"from": "gpt", "value": "It is a cat"},
        ],
    }
    if has_image:
        sample["image"] = encoded(8, 8)
    trained = label_mask(tokenizer, sample, chat_template(conversation))
    prompt = builder_for(tokenizer, conversation).token_ids(question, int(has_image))
    assert np.count_nonzero(prompt == IMAGE_TOKEN) == has_image
    np.testing.assert_array_equal(trained.ids[: len(prompt)], prompt)
    assert (trained.labels[: len(prompt)] == IGNORE).all()
    answer = [*tokenizer.encode("It is a cat"), tokenizer.eos_id]
    assert trained.labels[len(prompt) :].tolist() == answer


@pytest.mark.parametrize("mode", ["pad", "crop"])
@pytest.mark.parametrize(("width", "height"), [(60, 20), (9, 31)])
def test_pixels_are_those_of_training(
    tokenizer: Tokenizer, mode: ImageMode, width: int, height: int
) -> None:
    """Both doors, for an image that is not square and a tower whose mean is not CLIP's."""
    content = encoded(width, height)
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It"}]
    processor = ImageProcessor(28, MEAN, mode)
    preprocess = Preprocessor(tokenizer, chat_template("vicuna_v1"), processor)
    example = preprocess({"id": "1", "image": content, "conversations": turns})
    builder = builder_for(tokenizer, mode=mode)
    (request,) = builder.requests(builder.drafts([content], ["What?"]))
    np.testing.assert_array_equal(request.images[0].crops, example.pixels[None])
    if mode == "pad":
        assert example.pixels[0, 0].tolist() == [127, 63, 191]
    prompt = request.token_ids
    np.testing.assert_array_equal(example.token_ids[: len(prompt)], prompt)


def test_several_images_and_literal_placeholders_are_refused(
    tokenizer: SentencePieceTokenizer,
) -> None:
    builder = builder_for(tokenizer)
    with pytest.raises(ValueError, match="has 2 images; the model takes one image per prompt"):
        builder.token_ids("What?", 2)
    with pytest.raises(ValueError, match="literal '<image>'"):
        builder.token_ids("What is <image>?", 1)
    with pytest.raises(ValueError, match="unknown conversation 'v9'; expected one of .*vicuna_v1"):
        chat_template("v9")
    with pytest.raises(ValueError, match="unknown image mode 'stretch'"):
        builder_for(tokenizer, mode="stretch")


@pytest.mark.parametrize("mode", ["pad", "crop"])
def test_images_are_decoded_as_they_are_asked_for(
    tokenizer: Tokenizer, tmp_path: pathlib.Path, mode: str
) -> None:
    builder = builder_for(tokenizer, mode=mode)
    first = tmp_path / "first.png"
    first.write_bytes(encoded(40, 20))
    late = tmp_path / "late.png"
    sampling = SamplingParams(seed=9)
    ids = builder.token_ids("What?", 1)
    drafts = [
        Draft(0, ids, (named_image(first, "image 0"),), sampling=sampling),
        Draft(1, builder.token_ids("And?", 0)),
        Draft(2, ids, (named_image(tmp_path / "none.png", "image 2"),)),
        Draft(3, ids, (named_image(late, "image 3"),), continuation=np.array([7, 8], np.int32)),
    ]
    assert [draft.opening.text_tokens - len(ids) for draft in drafts[::3]] == [-1, 1]
    refused: dict[int, str] = {}
    requests = builder.requests(drafts, lambda key, error: refused.setdefault(key, str(error)))
    request = next(requests)
    late.write_bytes(encoded(20, 40))  # not there before
    expected = ImageProcessor(28, MEAN, mode)(first)
    np.testing.assert_array_equal(request.images[0].crops, expected[None])
    assert (request.key, request.sampling) == (0, sampling)
    assert next(requests).images == ()
    request = next(requests)
    assert (request.key, request.continuation.tolist()) == (3, [7, 8])
    assert next(requests, None) is None
    assert list(refused) == [2]
    assert "none.png" in refused[2]


def test_data_urls_are_images_and_others_are_said_in_a_line() -> None:
    content = encoded(200, 200)
    text = base64.b64encode(content).decode()
    name, source = named_image(f"data:image/png;base64,{text}", "image 0")
    assert (name, source) == ("image 0", content)
    with pytest.raises(ImageError, match="^image 0: "):
        ImageProcessor(28, MEAN)(*reversed(named_image("data:image/png;base64,AAAA", "image 0")))
    for wrong, message in (
        (f"data:image/png;base64,{text}!", "image 0: the data URL .* is not base64"),
        (f"data:text/plain,{text}", "image 0 is the URL .* nothing is downloaded"),
        ("https://example.org/a.jpg", "image 0 is the URL 'https://example.org/a.jpg'"),
        (7, "image 0 is 7; expected a path, bytes"),
        ({"a": list(range(1000))}, "image 0 is {'a'"),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            named_image(wrong, "image 0")
        assert len(str(refused.value)) < 250


def test_ids_are_checked_against_their_images() -> None:
    processor = PictureProcessor(CONFIG, 28, "pad")
    image = np.zeros((30, 20, 3), np.uint8)
    (draft,) = drafts_of_ids([image], [[1, -200, 7]], processor)
    assert draft.token_ids.tolist() == [1, -200, 7]
    assert draft.layouts == ()  # all are alike
    for images, ids, message in (
        ([image], [[1, 7]], "token_ids 0 hold 0 ids -200 for 1 images; expected one for each"),
        ([None], [[1, -200]], "token_ids 0 hold 1 ids -200 for 0 images"),
        ([None], [[1.5]], r"token_ids 0 are \[1\.5\]; expected a list of integers"),
        ([None], [[]], r"token_ids 0 are \[\]; expected a list of integers"),
        ([None], [[1], [2]], "1 images but 2 lists of ids"),
        ([(image, image)], [[-200, -200]], "prompt 0 has 2 images; the model takes one image"),
    ):
        with pytest.raises(ValueError, match=message):
            drafts_of_ids(images, ids, processor)
