"""The data sets as they are stored: `digits_vqa` and `llava_json`."""

import dataclasses
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prumerge_jax.data import datasets, llava_json, samples
from prumerge_jax.digits import dataset as digits_vqa
from prumerge_jax.digits import questions as digits_questions
from prumerge_jax.digits import scenes as digits
from prumerge_jax.messages import shortened

TINY = {"train_scenes": 8, "validation_scenes": 2, "test_scenes": 4, "scenes_per_layout": 4}


@pytest.fixture(scope="module")
def digits_builder(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("digits_vqa")
    return samples.prepare(digits_vqa.DigitsVqa, digits_vqa.DigitsVqaConfig(**TINY), data_dir)


def test_digits_vqa_stores_every_scene_in_order(digits_builder) -> None:
    for split in digits.SPLITS:
        source = samples.record_source(digits_builder, split)
        assert len(source) == TINY[f"{split}_scenes"]
        for index, record in enumerate(source):
            layout = 4 if split == "train" else 1
            scene = digits.draw_scene(split, index, seed=0, scenes_per_layout=layout)
            assert record["id"].decode() == scene.id
            assert np.array_equal(Image.open(io.BytesIO(record["image"])), scene.image)
            assert [place.decode() for place in record["places"]] == list(scene.places)
            assert list(record["digits"]) == list(scene.digits)
            assert record["caption"].decode() == digits_questions.caption(scene)


def test_digits_vqa_records_are_conversations_that_end_in_the_caption(digits_builder) -> None:
    record = samples.record_source(digits_builder, "train")[3]
    _, questions = digits_questions.draw_with_questions(
        "train", 3, seed=0, scenes_per_layout=4, questions_per_family=2
    )
    families = [family.decode() for family in record["families"]]
    assert families == [*(question.family for question in questions), "caption"]
    sample = samples.from_record(record)
    turns = sample["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * len(families)
    texts = [turn["value"] for turn in turns]
    assert texts[0] == f"<image>\n{questions[0].text}"
    assert texts[2:-2:2] == [question.text for question in questions[1:]]
    assert texts[1:-2:2] == [question.response for question in questions]
    assert texts[-1] == record["caption"].decode()


def test_digits_vqa_gives_captions_too(digits_builder) -> None:
    record = samples.record_source(digits_builder, "train")[0]
    caption = record["caption"].decode()
    with_caption = digits_vqa.caption_sample(record)
    assert with_caption["image"] == record["image"]
    assert [turn["value"] for turn in with_caption["conversations"]] == ["<image>", caption]


def test_other_sizes_or_seeds_are_another_data_set() -> None:
    configs = [
        digits_vqa.DigitsVqaConfig(**(TINY | change))
        for change in ({}, {"train_scenes": 12}, {"test_scenes": 5}, {"seed": 1})
    ]
    assert len({config.name for config in configs}) == len(configs)


def test_an_incomplete_layout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train_scenes is 10.*multiple of.*\(4\)"):
        digits_vqa.DigitsVqaConfig(train_scenes=10, scenes_per_layout=4)


@pytest.mark.slow
def test_nothing_imports_tensorflow(tmp_path: pathlib.Path) -> None:
    # A TensorFlow that is installed, but ends the program when it is imported.
    decoy = tmp_path / "decoy" / "tensorflow"
    decoy.mkdir(parents=True)
    (decoy / "__init__.py").write_text("import os\nos._exit(99)\n")
    program = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(decoy.parent)!r})
        from prumerge_jax.data import pipeline, samples
        from prumerge_jax.digits import dataset as digits_vqa
        config = digits_vqa.DigitsVqaConfig(**{TINY})
        builder = samples.prepare(digits_vqa.DigitsVqa, config, {str(tmp_path / "data")!r})
        source = samples.record_source(builder, "train")
        dataset = pipeline.examples(source, lambda sample: sample["id"])
        print(list(pipeline.read(dataset)))
    """)
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "'train_000007'" in result.stdout


def _turns(*texts: str, roles: tuple[str, ...] = ("human", "gpt")) -> list[dict[str, str]]:
    return [
        {"from": roles[number % len(roles)], "value": text} for number, text in enumerate(texts)
    ]


@pytest.fixture
def image_folder(tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "images"
    (folder / "coco").mkdir(parents=True)
    Image.new("RGB", (5, 4), (200, 100, 50)).save(folder / "coco" / "1.jpg")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_bytes(b"<html>not found</html>")
    return folder


def _write(folder: pathlib.Path, entries: Any) -> pathlib.Path:
    file = folder / "mix.json"
    file.write_text(json.dumps(entries))
    return file


def _prepare(folder: pathlib.Path, entries: list[dict[str, Any]], image_folder: pathlib.Path):
    config = llava_json.LlavaJsonConfig(
        json_file=str(_write(folder, entries)), image_folder=str(image_folder)
    )
    return samples.prepare(llava_json.LlavaJson, config, folder / "data")


def test_llava_json_keeps_samples_and_files_as_they_are(tmp_path, image_folder) -> None:
    entries = [
        {
            "id": "with image",
            "image": "coco/1.jpg",
            "conversations": _turns("<image>\nWhat is this?", "Ein Häuschen.", "Sure?", "Yes."),
        },
        {"id": 7, "conversations": _turns("Hello", "Hi")},
        {
            "id": "greeting first",
            "conversations": _turns("Welcome", "Hello", "Hi", roles=("gpt", "human")),
        },
    ]
    source = samples.record_source(_prepare(tmp_path, entries, image_folder), "train")
    stored = [samples.from_record(record) for record in source]
    assert [sample["id"] for sample in stored] == ["with image", "7", "greeting first"]
    assert stored[0]["image"] == (image_folder / "coco" / "1.jpg").read_bytes()
    assert all("image" not in sample for sample in stored[1:])
    for sample, entry in zip(stored, entries, strict=True):
        assert sample["conversations"] == entry["conversations"]


QUESTION = _turns("<image>\nWhat?", "A cat.")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"image": "coco/2.jpg"}, r"no image file .*coco/2\.jpg"),
        ({"image": "coco"}, "coco' is not a regular file"),
        ({"image": "a\0b.jpg"}, "no image file"),
        ({"image": "x" * 5000}, "no image file"),
        ({"image": 7}, "image is 7; expected a path"),
        ({"conversations": _turns("<image> \ud83d", "b")}, r"half of a surrogate pair \(.ud83d\)"),
        ({"conversations": _turns("<image>", "b" * 9000, "c" + "<image>", "d")}, "2 turns"),
        ({"image": "empty.jpg"}, r"empty\.jpg is empty"),
        ({"image": "../mix.json"}, "leads out of the image folder"),
        ({"image": "/etc/hostname"}, "leads out of the image folder"),
        ({"image": None}, "image is None; expected a path, or no image key"),
        ({"conversations": _turns("What?", "A cat.")}, "<image> appears in 0 turns"),
        (
            {"conversations": _turns("<image> a", "b", "<image> c", "d")},
            "<image> appears in 2 turns",
        ),
        ({"conversations": _turns("What?", "A <image>.")}, "<image> appears in an answer"),
        ({"conversations": _turns("<image>", "b", roles=("human",))}, "turn 1 is from 'human'"),
        ({"conversations": _turns("<image>", "b", roles=("human", "bot"))}, "turn 1 is from 'bot'"),
        ({"conversations": _turns("<image>")}, "a question without an answer"),
        ({"conversations": []}, "no human turn"),
        ({"conversations": None}, 'no "conversations" list'),
    ],
)
def test_llava_json_names_the_faulty_sample(tmp_path, image_folder, fault, message) -> None:
    good = {"id": "good", "image": "coco/1.jpg", "conversations": QUESTION}
    bad = {"id": "the bad one", "image": "coco/1.jpg", "conversations": QUESTION} | fault
    file = _write(tmp_path, [good, bad, good])
    with pytest.raises(ValueError, match=f"1 of 3 samples.*\n.*'the bad one'.*{message}"):
        llava_json.read_checked(file, image_folder)
    file = _write(tmp_path, [good, good])
    assert llava_json.read_checked(file, image_folder) == [good, good]


def test_llava_json_refuses_a_mark_without_image(tmp_path, image_folder) -> None:
    file = _write(tmp_path, [{"id": "lost", "conversations": QUESTION}])
    with pytest.raises(ValueError, match="'lost'.*<image> in a text without image"):
        llava_json.read_checked(file, image_folder)


def test_llava_json_counts_faults_and_shows_the_first_ten(tmp_path, image_folder) -> None:
    file = _write(tmp_path, [{"id": f"s{n}", "conversations": []} for n in range(25)])
    with pytest.raises(ValueError, match=r"25 of 25 samples[\s\S]*'s9'[\s\S]*15 more") as caught:
        llava_json.read_checked(file, image_folder)
    assert "'s10'" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not a JSON file"),
        (b"[]", "expected a JSON list with at least one sample"),
        (b'{"id": 1}', "expected a JSON list with at least one sample"),
        (b'[{"id":\n"f\xfcr"}]', r"byte 10 \(line 2\) is not UTF-8; convert the file"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "not a JSON file"),
        (b'[{"id": {"a": 1}, "conversations": []}]', "id is {'a': 1}; expected a string"),
    ],
)
def test_llava_json_refuses_a_file_that_is_no_list(tmp_path, content: bytes, message: str) -> None:
    file = tmp_path / "mix.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*\n?.*{message}") as error:
        llava_json.read_checked(file, tmp_path)
    assert len(str(error.value)) < 1000


def test_a_byte_order_mark_is_read(tmp_path) -> None:
    file = tmp_path / "mix.json"
    entries = [{"id": 1, "conversations": _turns("hi", "x")}]
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(entries).encode())
    assert llava_json.read_checked(file, tmp_path) == entries


@pytest.mark.parametrize("kind", ["json", "image"])
def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path, image_folder, kind) -> None:
    pipe = tmp_path / "mix.json" if kind == "json" else image_folder / "1.jpg"
    if kind == "image":
        _write(tmp_path, [{"id": "a", "image": "1.jpg", "conversations": QUESTION}])
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="is not a regular file"):
        llava_json.read_checked(tmp_path / "mix.json", image_folder)


def test_what_is_not_set_or_not_there_is_named(tmp_path, image_folder) -> None:
    with pytest.raises(ValueError, match="data.json_file is not set"):
        llava_json.LlavaJsonConfig()
    file = _write(tmp_path, [{"id": "a", "image": "coco/1.jpg", "conversations": QUESTION}])
    with pytest.raises(ValueError, match="data.image_folder is not set"):
        llava_json.LlavaJsonConfig(json_file=str(file))
    with pytest.raises(FileNotFoundError, match="gone: no such directory; it is data.image_folder"):
        llava_json.LlavaJsonConfig(json_file=str(file), image_folder=str(tmp_path / "gone"))


def test_llava_json_refuses_a_file_that_is_no_image(tmp_path, image_folder) -> None:
    entries = [{"id": "a page", "image": "page.jpg", "conversations": QUESTION}]
    with pytest.raises(ValueError, match=r"'a page': .*page\.jpg: the file is HTML or XML text"):
        _prepare(tmp_path, entries, image_folder)


def test_an_edited_json_file_is_another_data_set(tmp_path, image_folder) -> None:
    def stored_ids(name: str) -> list[bytes]:
        builder = _prepare(
            tmp_path, [{"id": name, "conversations": _turns("Hello", "Hi")}], image_folder
        )
        return [record["id"] for record in samples.record_source(builder, "train")]

    assert stored_ids("first") == [b"first"]
    assert stored_ids("second") == [b"second"]


def test_a_missing_json_file_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        llava_json.LlavaJsonConfig(json_file=str(tmp_path / "nowhere.json"))


def _samples_with_images(folder: pathlib.Path, count: int) -> list[dict[str, Any]]:
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.jpg")
    return [
        {"id": f"s{index}", "image": f"{index}.jpg", "conversations": QUESTION}
        for index in range(count)
    ]


def _first_images(folder: pathlib.Path, entries: list, image_folder: pathlib.Path) -> list[bytes]:
    source = samples.record_source(_prepare(folder, entries, image_folder), "train")
    return [record["image"] for record in source]


def test_another_folder_or_a_replaced_image_is_read_again(tmp_path) -> None:
    folders = [tmp_path / name for name in ("sharp", "blurred")]
    for folder, colour in zip(folders, ("red", "blue"), strict=True):
        folder.mkdir()
        Image.new("RGB", (32, 32), colour).save(folder / "a.png")
    entries = [{"id": "a", "image": "a.png", "conversations": QUESTION}]
    for folder in folders:
        assert _first_images(tmp_path, entries, folder) == [(folder / "a.png").read_bytes()]
    file = folders[0] / "a.png"
    Image.new("RGB", (32, 32), "green").save(file)  # as many bytes
    assert _first_images(tmp_path, entries, folders[0]) == [file.read_bytes()]


def test_unreadable_images_are_named_together_and_repaired_ones_are_read(tmp_path) -> None:
    entries = _samples_with_images(tmp_path, 5)
    intact = {index: (tmp_path / f"{index}.jpg").read_bytes() for index in (1, 3)}
    for index, content in intact.items():
        (tmp_path / f"{index}.jpg").write_bytes(content[:-300])
    with pytest.raises(ValueError, match="2 of 5 samples have an image") as error:
        _prepare(tmp_path, entries, tmp_path)
    for index in intact:
        named = shortened(f"sample 's{index}': {tmp_path}/{index}.jpg")
        assert f"{named}: " in str(error.value)
    assert "data.skip_bad_images=true" in str(error.value)
    for index, content in intact.items():
        (tmp_path / f"{index}.jpg").write_bytes(content)
    assert len(_first_images(tmp_path, entries, tmp_path)) == 5


def test_samples_with_unreadable_images_can_be_skipped_and_are_counted(tmp_path, caplog) -> None:
    entries = [*_samples_with_images(tmp_path, 4), {"id": "t", "conversations": _turns("a", "b")}]
    (tmp_path / "1.jpg").write_bytes((tmp_path / "1.jpg").read_bytes()[:-300])
    data = datasets.DataConfig(
        "llava_json", str(tmp_path / "data"), str(_write(tmp_path, entries)), str(tmp_path), True
    )
    for _ in range(2):  # written, then found
        caplog.clear()
        records = datasets.open_dataset(data).records()
        assert [record["id"] for record in records.source] == [b"s0", b"s2", b"s3", b"t"]
        assert records.has_image.tolist() == [True, True, True, False]
        assert (
            "1 of 5 samples are left out, as their images cannot be decoded ('s1')" in caplog.text
        )
    for index in (0, 2, 3):
        (tmp_path / f"{index}.jpg").write_bytes(b"\xff\xd8 nothing")
    data = dataclasses.replace(data, json_file=str(_write(tmp_path, entries[:4])))
    with pytest.raises(ValueError, match="4 of 4 samples have an image that cannot be used"):
        datasets.open_dataset(data).records()


def test_an_unknown_data_set_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"data.name is 'llava-json'.*did you mean 'llava_json'\?"):
        datasets.open_dataset(datasets.DataConfig("llava-json"))
