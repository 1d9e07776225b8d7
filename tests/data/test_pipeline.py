"""Reading samples: decoding and labelling, order, resuming."""

import io
import multiprocessing.process

import grain
import numpy as np
import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prumerge_jax.data import pipeline, samples
from prumerge_jax.data.conversation import SampleError
from prumerge_jax.data.images import ImageError, ImageProcessor
from prumerge_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from prumerge_jax.data.templates import TEMPLATES
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.digits import dataset as digits_vqa
from prumerge_jax.digits import tokenizer as digits_tokenizer
from prumerge_jax.models.config import CLIP_MEAN

CONFIG = digits_vqa.DigitsVqaConfig(
    train_scenes=24, validation_scenes=1, test_scenes=1, scenes_per_layout=4
)
PROCESSOR = ImageProcessor(96, CLIP_MEAN)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    file.write_bytes(digits_tokenizer.build_for_digits())
    return SentencePieceTokenizer(file)


@pytest.fixture(scope="module")
def preprocess(tokenizer) -> pipeline.Preprocessor:
    return pipeline.Preprocessor(tokenizer, TEMPLATES["vicuna_v1"], PROCESSOR)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    builder = samples.prepare(digits_vqa.DigitsVqa, CONFIG, tmp_path_factory.mktemp("data"))
    return samples.record_source(builder, "train")


def _learned(tokenizer: Tokenizer, example: pipeline.Example) -> list[str]:
    """The supervised texts of an example, cut after each `</s>`."""
    learned = example.labels[example.labels >= 0]
    ends = np.flatnonzero(learned == tokenizer.eos_id) + 1
    return [tokenizer.decode(part) for part in np.split(learned, ends) if part.size]


def _ids(batches) -> list[str]:
    return [example.id for batch in batches for example in batch]


def test_conversations_become_pixels_ids_and_labels(source, preprocess, tokenizer) -> None:
    dataset = pipeline.examples(source, preprocess)
    assert len(dataset) == CONFIG.train_scenes
    for record, example in zip(source, dataset, strict=True):
        assert np.array_equal(example.pixels, Image.open(io.BytesIO(record["image"])))
        assert example.pixels.dtype == np.uint8
        assert example.has_image
        assert np.count_nonzero(example.token_ids == IMAGE_TOKEN) == 1
        assert example.token_ids.dtype == example.labels.dtype == np.int32
        assert not example.mismatch
        answers = [value.decode() for value in record["conversations"]["value"][1::2]]
        assert _learned(tokenizer, example) == answers
        learned = example.labels >= 0
        assert np.array_equal(example.labels[learned], example.token_ids[learned])


def test_captions_are_learned_whole(source, preprocess, tokenizer) -> None:
    plain = pipeline.Preprocessor(tokenizer, TEMPLATES["plain"], PROCESSOR)
    dataset = pipeline.examples(source, plain, to_sample=digits_vqa.caption_sample)
    example = dataset[0]
    assert example.token_ids[:2].tolist() == [tokenizer.bos_id, IMAGE_TOKEN]
    assert example.labels[:2].tolist() == [-100, -100]
    assert np.array_equal(example.labels[2:], example.token_ids[2:])
    assert tokenizer.decode(example.labels[2:]) == source[0]["caption"].decode()


def test_text_alone_has_empty_pixels_and_no_image_token(preprocess, tokenizer) -> None:
    turns = [{"from": "human", "value": "Is there a 3?"}, {"from": "gpt", "value": "no"}]
    example = preprocess({"id": "text", "conversations": turns})
    assert not example.has_image
    assert example.pixels.shape == (96, 96, 3)
    assert not example.pixels.any()
    assert IMAGE_TOKEN not in example.token_ids
    assert _learned(tokenizer, example) == ["no"]


def test_padding_has_the_colour_of_the_model_s_own_mean(tokenizer) -> None:
    """Training and inference share the processor, and so the pixels."""
    buffer = io.BytesIO()
    Image.new("RGB", (96, 48), "white").save(buffer, format="PNG")
    turns = [{"from": "human", "value": "<image>\nA?"}, {"from": "gpt", "value": "1"}]
    sample = {"id": "wide", "image": buffer.getvalue(), "conversations": turns}
    processor = ImageProcessor(96, (0.5, 0.25, 1.0))
    example = pipeline.Preprocessor(tokenizer, TEMPLATES["v1"], processor)(sample)
    assert example.pixels[0, 0].tolist() == [127, 63, 255]
    np.testing.assert_array_equal(example.pixels, processor(buffer.getvalue()))


def test_images_of_any_shape_are_padded_or_cropped(tokenizer) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20), (255, 0, 0)).save(buffer, format="PNG")
    sample = {
        "id": "wide",
        "image": buffer.getvalue(),
        "conversations": [
            {"from": "human", "value": "<image>\nIs there a 3?"},
            {"from": "gpt", "value": "no"},
        ],
    }
    for mode, red_rows in (("pad", 8), ("crop", 16)):
        preprocess = pipeline.Preprocessor(
            tokenizer, TEMPLATES["vicuna_v1"], ImageProcessor(16, CLIP_MEAN, mode)
        )
        rows = preprocess(sample).pixels[:, 8]
        # The image's edge is soft by the width of the bicubic filter.
        assert abs(int((rows == (255, 0, 0)).all(axis=1).sum()) - red_rows) <= 2


def test_errors_name_the_sample(preprocess) -> None:
    sample = {
        "id": "the bad one",
        "image": b"\x89PNG broken",
        "conversations": [
            {"from": "human", "value": "<image>\nIs there a 3?"},
            {"from": "gpt", "value": "no"},
        ],
    }
    with pytest.raises(ImageError, match="'the bad one'"):
        preprocess(sample)
    with pytest.raises(SampleError, match="'the bad one'.*<image> appears in 0 turns"):
        preprocess({**sample, "conversations": [{"from": "human", "value": "Is there a 3?"}]})


@pytest.mark.slow
@settings(max_examples=40)
@given(st.data())
def test_a_stream_continues_from_any_start(data) -> None:
    size = data.draw(st.integers(1, 40), "size")
    epochs = data.draw(st.integers(1, 4), "epochs")
    seed = data.draw(st.integers(0, 2**32 - 1), "seed")
    start = data.draw(st.integers(0, size * epochs - 1), "start")
    dataset = grain.MapDataset.range(size)
    whole = list(pipeline.stream(dataset, seed=seed, epochs=epochs))
    for epoch in np.split(np.array(whole), epochs):
        assert sorted(epoch) == list(range(size))
    assert list(pipeline.stream(dataset, seed=seed, epochs=epochs, start=start)) == whole[start:]


def test_every_epoch_has_an_order_of_its_own() -> None:
    endless = pipeline.stream(grain.MapDataset.range(50), seed=3)
    epochs = [tuple(endless[50 * epoch + place] for place in range(50)) for epoch in range(5)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len(set(epochs)) == 5
    other = pipeline.stream(grain.MapDataset.range(50), seed=99)
    assert tuple(other[place] for place in range(50)) != epochs[0]


@pytest.mark.parametrize("start", [-1, 20])
def test_an_impossible_start_is_refused(start) -> None:
    with pytest.raises(ValueError, match=f"start is {start} of 20 elements"):
        pipeline.stream(grain.MapDataset.range(10), seed=0, epochs=2, start=start)


def test_scenes_of_one_layout_stay_together_when_grouped_first(source, preprocess) -> None:
    layouts = pipeline.grouped(pipeline.examples(source, preprocess), 4)
    groups = list(pipeline.stream(layouts, seed=0, epochs=1))
    numbers = [[int(example.id.removeprefix("train_")) for example in group] for group in groups]
    assert all(group == list(range(group[0], group[0] + 4)) for group in numbers)
    assert sorted(group[0] for group in numbers) == list(range(0, 24, 4))
    assert numbers != sorted(numbers)


@pytest.mark.slow
@pytest.mark.slow
def test_workers_whose_batches_nobody_takes_are_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Elements that no pipe holds, so that a worker cannot end by itself."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    large = grain.MapDataset.source(range(64)).map(megabyte)
    iterator = pipeline.read(large, num_threads=1, num_workers=2)
    assert next(iterator).nbytes == 1 << 20
    workers = multiprocessing.active_children()
    waits = []
    join = multiprocessing.process.BaseProcess.join

    def spy(process: multiprocessing.process.BaseProcess, timeout: float | None = None) -> None:
        waits.append(timeout)
        join(process, timeout)

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "join", spy)
    iterator.close()
    assert waits == [0.5, 0.5]
    assert len(workers) == 2
    for worker in workers:
        join(worker, 10)
        assert not worker.is_alive()


def megabyte(index: int) -> np.ndarray:
    return np.full(1 << 20, index, np.uint8)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_reading_resumes_where_the_state_was_taken(source, preprocess, num_workers) -> None:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    stream = pipeline.stream(pipeline.examples(source, preprocess), seed=0, epochs=2)
    batches = pipeline.grouped(stream, 5)
    straight = [_ids([batch]) for batch in pipeline.read(batches, num_workers=num_workers)]
    assert [len(batch) for batch in straight] == [5] * 9
    first = pipeline.read(batches, num_workers=num_workers)
    taken = [_ids([next(first)]) for _ in range(4)]
    second = pipeline.read(batches, num_workers=num_workers)
    second.set_state(first.get_state())
    assert taken + [_ids([batch]) for batch in second] == straight
