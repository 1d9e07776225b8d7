"""Which samples come when: LLaVA files grouped by modality, resumed at any sample."""

import dataclasses
import itertools
import json
import logging
import pathlib

import ml_collections
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from configs import common
from prumerge_jax.data.pictures import PictureProcessor
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.models.config import LlavaConfig, VisionConfig
from prumerge_jax.training import inputs
from prumerge_jax.training.config import parse, with_sizes
from prumerge_jax.training.inputs import ModalityOrder, TrainingData, TrainingSource, dealt

IMAGES, TEXTS = 13, 9
MODEL = LlavaConfig(vision=VisionConfig(image_size=8, patch_size=4, width=8, num_heads=1))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ml_collections.ConfigDict:
    folder = tmp_path_factory.mktemp("llava")
    entries = []
    for index in range(IMAGES + TEXTS):
        turns = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": str(index)}]
        entry = {"id": f"s{index}", "conversations": turns}
        if index < IMAGES:
            entry["image"] = f"{index}.png"
            turns[0]["value"] = "<image>\nHow many?"
            Image.new("RGB", (20, 10), (19 * index, 0, 0)).save(folder / entry["image"])
        entries.append(entry)
    (folder / "data.json").write_text(json.dumps(entries))
    config = common.training()
    config.data = common.llava_json()
    config.data.json_file = str(folder / "data.json")
    config.data.image_folder = str(folder)
    config.data.directory = str(folder / "prepared")
    config.group_by_modality_length = True
    config.batch_size = 4
    config.run.num_workers = 0
    return config


def open_source(config: ml_collections.ConfigDict, tokenizer: Tokenizer) -> TrainingSource:
    return inputs.open_conversations(with_sizes(parse(config), MODEL), tokenizer, 1)


def first_batches(data: TrainingData, used: int, count: int) -> list[list[str]]:
    batches = data.batches(used, range(4), 1)
    return [[e.id for e in batch] for batch, _ in zip(batches, range(count), strict=False)]


@pytest.mark.parametrize("grouped", [True, False])
def test_a_run_continues_at_any_batch_and_shows_every_sample_once_an_epoch(
    config: ml_collections.ConfigDict, tokenizer: Tokenizer, grouped: bool
) -> None:
    config = config.copy_and_resolve_references()
    config.group_by_modality_length = grouped
    data = open_source(config, tokenizer).prepare()
    straight = first_batches(data, 0, 10)
    for done in (1, 5, 7):
        assert first_batches(data, 4 * done, 10 - done) == straight[done:]
    epoch = [name for batch in straight[: data.samples // 4] for name in batch]
    assert len(set(epoch)) == len(epoch)
    pure = [len({int(name[1:]) < IMAGES for name in batch}) == 1 for batch in straight[:5]]
    if grouped:
        assert data.samples == 20
        assert all(pure)  # three batches of images and two of text; the sixth would be mixed


def test_a_batch_is_dealt_out_to_the_shards_of_a_mesh(
    config: ml_collections.ConfigDict, tokenizer: Tokenizer
) -> None:
    """The same samples on any mesh, as much text on every shard, whatever process reads them."""
    data = open_source(config, tokenizer).prepare()
    straight = first_batches(data, 0, 4)
    whole = list(itertools.islice(data.batches(0, range(4), 2), 4))
    assert [{e.id for e in batch} for batch in whole] == [set(batch) for batch in straight]
    halves = zip(data.batches(0, range(2), 2), data.batches(0, range(2, 4), 2), strict=False)
    for batch, (first, second) in zip(whole, halves, strict=False):
        assert [e.id for e in batch] == [e.id for e in (*first, *second)]
        sizes = [e.token_ids.size for e in batch]
        assert abs(sum(sizes[:2]) - sum(sizes[2:])) <= max(sizes) - min(sizes)


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=8, max_size=32), shards=st.sampled_from([1, 2, 4])
)
def test_samples_are_dealt_out_evenly(sizes: list[int], shards: int) -> None:
    sizes = sizes[: len(sizes) // shards * shards]
    order = dealt(np.array(sizes), shards)
    assert sorted(order.tolist()) == list(range(len(sizes)))
    of_shards = np.array(sizes)[order].reshape(shards, -1).sum(1)
    assert of_shards.max() - of_shards.min() <= max(sizes) - min(sizes)
    if shards == 1:
        assert order.tolist() == list(range(len(sizes)))


def test_images_and_labels_are_those_of_the_file(
    config: ml_collections.ConfigDict, tokenizer: Tokenizer
) -> None:
    data = open_source(config, tokenizer).prepare()
    for batch, _ in zip(data.batches(0, range(4), 1), range(5), strict=False):
        for example in batch:
            index = int(example.id[1:])
            assert example.has_image == (index < IMAGES)
            learned = example.labels[example.labels >= 0]
            assert tokenizer.decode(learned) == str(index)
            assert learned[-1] == tokenizer.eos_id
            red = int(example.pixels[4, 4, 0])  # resizing may round by one
            assert abs(red - 19 * index * example.has_image) <= 1
            assert np.count_nonzero(example.token_ids == -200) == example.has_image


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "conversation",
            "vicuna",
            "'vicuna'; expected one of .* did you mean 'vicuna_v1'",
        ),
        ("batch_size", 64, "22 samples do not fill one batch of 64"),
        ("data.name", "coco", "data.name is 'coco'; expected one of .*'llava_json'"),
    ],
)
def test_what_cannot_be_is_refused(
    config: ml_collections.ConfigDict, tokenizer: Tokenizer, field: str, value: object, message: str
) -> None:
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        open_source(changed, tokenizer).prepare()


@settings(max_examples=40)
@given(
    images=st.integers(0, 60), texts=st.integers(0, 60), batch=st.integers(1, 9),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_an_epoch_has_every_sample_at_most_once_in_pure_batches(
    images: int, texts: int, batch: int, seed: int
) -> None:
    has_image = np.array([True] * images + [False] * texts)
    if len(has_image) < batch:
        with pytest.raises(ValueError, match="do not fill one batch"):
            ModalityOrder(has_image, batch, seed)
        return
    order = ModalityOrder(has_image, batch, seed)
    drawn = np.array([order(place) for place in range(2 * order.epoch_size)])
    for epoch in np.split(drawn, 2):
        assert len(np.unique(epoch)) == len(epoch) == len(has_image) // batch * batch
        kinds = has_image[epoch].reshape(-1, batch)
        mixed = [row for row in kinds if row.any() and not row.all()]
        # Less than one batch of either kind is left over, which makes at most one mixed batch
        # and one more of what remains.
        assert len(mixed) <= 2
        if mixed:
            pure_end = images // batch + texts // batch
            assert all((row.all() or not row.any()) for row in kinds[:pure_end])


def test_epochs_and_seeds_differ_and_repeat() -> None:
    has_image = np.arange(100) % 3 > 0
    first = ModalityOrder(has_image, 10, 0)
    again, other = ModalityOrder(has_image, 10, 0), ModalityOrder(has_image, 10, 1)
    places = range(300)
    assert [first(p) for p in places] == [again(p) for p in reversed(places)][::-1]
    assert [first(p) for p in places] != [other(p) for p in places]
    assert [first(p) for p in range(100)] != [first(p) for p in range(100, 200)]


def write(folder: pathlib.Path, conversations: list[list[str]]) -> ml_collections.ConfigDict:
    """A configuration for text alone; turns alternate, the human begins."""
    entries = [
        {
            "id": f"s{index}",
            "conversations": [
                {"from": ("human", "gpt")[number % 2], "value": text}
                for number, text in enumerate(texts)
            ],
        }
        for index, texts in enumerate(conversations)
    ]
    (folder / "data.json").write_text(json.dumps(entries))
    config = common.training()
    config.data.json_file = str(folder / "data.json")
    config.data.directory = str(folder / "prepared")
    config.batch_size = 1
    config.run.num_workers = 0
    return config


def test_samples_that_teach_nothing_are_counted_and_refused_when_there_are_no_others(
    tokenizer: Tokenizer, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, ends_with_human = ["Is there a 3?", "no"], ["Is there a 3?", "no", "And a 4?"]
    config = write(tmp_path, [good, ends_with_human, good, ends_with_human])
    for _ in range(2):  # counted, then read from the record
        caplog.clear()
        with caplog.at_level(logging.WARNING, "prumerge_jax"):
            open_source(config, tokenizer).prepare()
        ours = [r for r in caplog.records if r.name.startswith("prumerge_jax")]
        (message,) = [record.getMessage() for record in ours]
        assert message.startswith("2 of 4 samples have nothing to learn (the first are 's1', 's3')")
    config = write(tmp_path, [ends_with_human] * 3)
    records = set((tmp_path / "prepared" / "llava_json").iterdir())
    with pytest.raises(ValueError, match="none of the 3 samples has anything to learn .*'s0'"):
        open_source(config, tokenizer).prepare()
    assert set((tmp_path / "prepared" / "llava_json").iterdir()) == records  # nothing was written


def test_an_answer_that_max_length_cuts_off_is_nothing_to_learn(
    tokenizer: Tokenizer, tmp_path: pathlib.Path
) -> None:
    config = write(tmp_path, [["Is there a 3? " * 40, "no"]])
    open_source(config, tokenizer).prepare()
    config.max_length = 60
    with pytest.raises(ValueError, match="none of the 1 samples .*cut off by max_length"):
        open_source(config, tokenizer).prepare()


def test_labels_are_checked_against_the_run_s_own_row_length(
    tokenizer: Tokenizer, tmp_path: pathlib.Path
) -> None:
    """LLaVA checks the rounds of samples that fit a row; which ones do depends on its length."""
    role_in_answer = ["Is there a 3? " * 600, "no", "Yes?", "no ASSISTANT: yes"]
    config = write(tmp_path, [role_in_answer, ["A 3?", "no"]])
    for length, mismatched in ((2048, False), (8192, True)):
        config.max_length = length
        data = open_source(config, tokenizer).prepare()
        epoch = itertools.islice(data.batches(0, [0], 1), 2)
        found = {example.id: example.mismatch for (example,) in epoch}
        assert found == {"s0": mismatched, "s1": False}


def write_frames(folder: pathlib.Path, number: int) -> None:
    """A video as a folder of its frames."""
    folder.mkdir()
    for index in range(number):
        Image.new("RGB", (20, 30), (9 * index, 0, 0)).save(folder / f"{index}.png")


def test_images_in_tiles_several_images_and_videos(
    tokenizer: Tokenizer, tmp_path: pathlib.Path
) -> None:
    """From a file in LLaVA's form to pictures and labels; what a model does not take is named."""
    side = MODEL.vision.image_size
    for name, size in (("a", (2 * side, side)), ("b", (side, side))):
        Image.new("RGB", size, (90, 0, 9)).save(tmp_path / f"{name}.png")
    write_frames(tmp_path / "film", 5)
    entries = [
        ("one", {"image": "a.png"}, "<image>\nA 3?"),
        ("two", {"image": ["a.png", "b.png"]}, "<image> or <image>: where is a 3?"),
        ("film", {"video": "film"}, "A 3? <video>"),
    ]
    samples = [
        {"id": name, **shown, "conversations": [
            {"from": "human", "value": text}, {"from": "gpt", "value": "no"}]}
        for name, shown, text in entries
    ]  # fmt: skip
    config = write(tmp_path, [])
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    config.data.image_folder = str(tmp_path)
    config.data.json_file = str(tmp_path / "samples.json")
    sizes = dataclasses.replace(
        MODEL, family="llava_onevision", image_newline=True, anyres_max=9,
        image_grid_pinpoints=((side, side), (side, 2 * side)),
    )  # fmt: skip
    parsed = with_sizes(parse(config), sizes)
    assert parsed.room_for_crops == 32
    data = inputs.open_conversations(parsed, tokenizer, 1).prepare()
    found = {example.id: example for (example,) in itertools.islice(data.batches(0, [0], 1), 3)}
    crops = {name: [len(p.crops) for p in e.pictures] for name, e in found.items()}
    assert crops == {"one": [3], "two": [1, 1], "film": [32]}
    for name, example in found.items():
        assert np.count_nonzero(example.token_ids == IMAGE_TOKEN) == len(crops[name])
        assert tokenizer.decode(example.labels[example.labels >= 0].tolist()) == "no"
    with pytest.raises(ValueError, match="sample 'two' shows several images or a video; the model"):
        inputs.open_conversations(with_sizes(parse(config), MODEL), tokenizer, 1)
    samples[1]["conversations"][0]["value"] = "<image> only"
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    with pytest.raises(
        ValueError, match="<image> appears 1 times; expected once for each of the 2"
    ):
        inputs.open_conversations(parsed, tokenizer, 1)


SIDE = MODEL.vision.image_size
FAMILIES = {
    "llava_next": {
        "image_newline": True,
        "image_grid_pinpoints": ((SIDE, 2 * SIDE), (2 * SIDE, 2 * SIDE), (3 * SIDE, SIDE)),
    },
    "llava_onevision": {
        "image_newline": True,
        "image_grid_pinpoints": ((SIDE, SIDE), (SIDE, 2 * SIDE), (4 * SIDE, 4 * SIDE)),
        "anyres_max": 9,
    },
    "video_llava": {},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_samples_of_several_crops_are_dealt_out_by_what_they_show(
    tokenizer: Tokenizer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """The tokens that are counted by headers are those of the pictures that are made later."""
    shapes = [(8, 8), (30, 8), (8, 30), (17, 17), (60, 50), (16, 9)]
    for number, size in enumerate(shapes):
        Image.new("RGB", size, (90, 0, 9)).save(tmp_path / f"{number}.png")
    write_frames(tmp_path / "film", 3)
    shown = [{"image": f"{number}.png"} for number in range(len(shapes))]
    texts = ["<image>"] * len(shown)
    if family != "llava_next":
        shown += [{"image": ["0.png", "4.png"]}, {"video": "film"}]
        texts += ["<image> <image>", "<video>"]
    shown, texts = [*shown, {}, {}], [*texts, "No image.", "No image."]
    samples = [
        {"id": str(number), **each, "conversations": [
            {"from": "human", "value": text}, {"from": "gpt", "value": "no"}]}
        for number, (each, text) in enumerate(zip(shown, texts, strict=True))
    ]  # fmt: skip
    config = write(tmp_path, [])
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    config.data.image_folder = str(tmp_path)
    config.data.json_file = str(tmp_path / "samples.json")
    config.batch_size = len(samples)
    sizes = dataclasses.replace(MODEL, family=family, **FAMILIES[family])
    parsed = with_sizes(parse(config), sizes)
    orders = []
    for _ in range(2):
        data = inputs.open_conversations(parsed, tokenizer, 1, 0.5).prepare()
        (batch,) = itertools.islice(data.batches(0, range(len(samples)), 2), 1)
        spans = {e.id: sum(p.layout.span for p in e.pictures) for e in batch}
        load = [e.token_ids.size + round(0.5 * spans[e.id]) for e in batch]
        halves = np.array(load).reshape(2, -1).sum(1)
        assert abs(halves[0] - halves[1]) <= max(load) - min(load)
        (stored,) = (tmp_path / "prepared" / "visual").glob("*.json")
        counted = json.loads(stored.read_text())["tokens"]
        assert counted == [spans[each["id"]] for each in samples]
        assert len(set(counted)) > 2
        orders.append(list(spans))
        monkeypatch.delattr(PictureProcessor, "layouts", raising=False)  # it is stored by now
    assert orders[0] == orders[1]
