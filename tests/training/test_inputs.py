"""Which samples come when: LLaVA files grouped by modality, resumed at any sample."""

import json

import ml_collections
import numpy as np
import pytest
from PIL import Image

from configs import common
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.training import inputs

IMAGES, TEXTS = 13, 9


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


def first_batches(data: inputs.Inputs, used: int, count: int) -> list[list[str]]:
    batches = data.lists(used, range(4))
    return [[e.id for e in batch] for batch, _ in zip(batches, range(count), strict=False)]


@pytest.mark.parametrize("grouped", [True, False])
def test_a_run_continues_at_any_batch_and_shows_every_sample_once_an_epoch(
    config: ml_collections.ConfigDict, tokenizer: Tokenizer, grouped: bool
) -> None:
    config = config.copy_and_resolve_references()
    config.group_by_modality_length = grouped
    data = inputs.conversations(config, tokenizer, 8)
    straight = first_batches(data, 0, 10)
    for done in (1, 5, 7):
        assert first_batches(data, 4 * done, 10 - done) == straight[done:]
    epoch = [name for batch in straight[: data.samples // 4] for name in batch]
    assert len(set(epoch)) == len(epoch)
    pure = [len({int(name[1:]) < IMAGES for name in batch}) == 1 for batch in straight[:5]]
    if grouped:
        assert data.samples == 20
        assert all(pure)  # three batches of pictures and two of text; the sixth would be mixed


def test_pictures_and_labels_are_those_of_the_file(
    config: ml_collections.ConfigDict, tokenizer: Tokenizer
) -> None:
    data = inputs.conversations(config, tokenizer, 8)
    for batch, _ in zip(data.lists(0, range(4)), range(5), strict=False):
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
        ("conversation", "vicuna", "conversation is 'vicuna'; expected one of"),
        ("batch_size", 64, "22 samples do not fill one batch of 64"),
        ("data.name", "coco", "data.name is 'coco'; expected 'digits_vqa' or 'llava_json'"),
    ],
)
def test_what_cannot_be_is_refused(
    config: ml_collections.ConfigDict, tokenizer: Tokenizer, field: str, value: object, message: str
) -> None:
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        inputs.conversations(changed, tokenizer, 8)
