"""`run.evaluate` as programs call it: what is refused before a model is loaded."""

import base64
import json
import os
import pathlib
import sys
from typing import Any

import pytest
from ml_collections import ConfigDict
from PIL import Image

import prumerge_jax.digits.benchmark  # noqa: F401  # registers itself
from configs import eval as eval_config
from prumerge_jax.evaluation import run, runner, summary
from prumerge_jax.llava import Llava
from tests.tiny_llava import write_tiny_llava

POPE_ROWS = [
    {
        "question_id": number,
        "image": f"{number // 2}.png",
        "text": f"Is there a {number}?\nAnswer the question using a single word or phrase.",
        "category": "random",
    }
    for number in range(4)
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny model, two images, four POPE questions and their labels."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_tiny_llava(folder / "tiny")
    (folder / "images").mkdir()
    for number in range(2):
        Image.new("RGB", (60, 40), (200 * number, 0, 90)).save(folder / f"images/{number}.png")
    write_lines(folder / "questions.jsonl", POPE_ROWS)
    (folder / "labels").mkdir()
    labels = [
        {"question_id": row["question_id"], "image": row["image"], "label": "yes"}
        | {"text": row["text"].split("\n")[0]}
        for row in POPE_ROWS
    ]
    write_lines(folder / "labels" / "coco_pope_random.json", labels)
    return folder


def write_lines(path: pathlib.Path, rows: list[dict[str, Any]]) -> pathlib.Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pope_config(files: pathlib.Path, **changes: Any) -> ConfigDict:
    """POPE on the tiny model; double underscores stand for dots."""
    config = eval_config.get_config()
    config.engine.update({"batch_size": 4, "window_size": 4, "slots": 4})
    config.decoding.max_new_tokens = 3
    fields: dict[str, Any] = {
        "checkpoint": str(files / "tiny"),
        "benchmark": "pope",
        "questions": str(files / "questions.jsonl"),
        "images": str(files / "images"),
        "annotations": str(files / "labels"),
        "reduction": "prumerge",
    }
    for name, value in (fields | changes).items():
        *sections, field = name.split("__")
        section = config
        for part in sections:
            section = section[part]
        with section.unlocked(), section.ignore_type():
            section[field] = value
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chip": "h10"}, "config.chip: unknown chip 'h10'; did you mean 'h100'"),
        ({"decoding__conversation": "vicuna"}, "unknown conversation 'vicuna'.*vicuna_v1"),
        ({"decoding__protocol": "llava-2"}, "unknown protocol 'llava-2'"),
        ({"decoding__position_ids": "orig"}, "unknown position ids 'orig'.*original"),
        ({"decoding__temperature": -0.5}, "decoding.temperature=-0.5: expected a finite number"),
        ({"decoding__temperature": float("nan")}, "decoding.temperature=nan"),
        ({"decoding__temperature": "hot"}, "decoding.temperature: expected float, not 'hot'"),
        ({"decoding__top_p": -3.0}, "decoding.top_p=-3.0: expected above 0 and at most 1"),
        ({"decoding__top_p": 0.0}, "decoding.top_p=0.0"),
        ({"decoding__seed": -1}, "decoding.seed=-1"),
        ({"decoding__max_new_tokens": 0}, "decoding.max_new_tokens=0"),
        ({"decoding__max_new_tokens": 512}, "the model takes 512 positions"),
        ({"decoding__num_workers": -1}, "decoding.num_workers=-1"),
        ({"decoding__temperatur": 0.0}, "no field 'temperatur'; did you mean 'temperature'"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"quantize": "int9"}, "unknown quantize 'int9'; did you mean"),
        ({"cache_dtype": "int4"}, "unknown cache dtype 'int4'"),
        ({"reduction": "full prumerg"}, "unknown reduction 'prumerg'"),
        (
            {"reduction": "full prumerge", "tokens": "64 32"},
            "none of 'full prumerge' keeps a fixed",
        ),
        ({"reduction": "cover", "tokens": "64 many"}, "config.tokens='64 many': expected counts"),
        ({"reduction": "cover", "tokens": "0"}, "tokens is 0; expected"),
        ({"reduction": ""}, "no reduction is named"),
        ({"reduction": "full downsample:9"}, "downsample"),
        ({"reductions": "full"}, "no field 'reductions'; did you mean 'reduction'"),
        ({"mesh__data": 0}, "mesh.data=0"),
        ({"mesh__tensor": 1024}, "needs 1024 devices"),
        ({"mesh__data": 2, "engine__prefill_rows": 3}, "engine.prefill_rows"),
        ({"tasks": ({"benchmark": "pope", "annotation": "x"},)}, "did you mean 'annotations'"),
        ({"benchmark": "popo"}, "did you mean 'pope'"),
        ({"benchmark": None}, "own questions have no score"),
        ({"annotations": None}, "cannot be scored without annotations"),
        ({"questions": None}, "needs its question file"),
        ({"checkpoint": "nowhere"}, "nowhere"),
        ({"checkpoint": ""}, "no model to score"),
        ({"images": "nowhere"}, "image folder nowhere does not exist"),
    ],
)
def test_wrong_fields_are_refused_before_anything_is_loaded_or_written(
    files: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(Llava, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises((ValueError, OSError), match=message) as error:
        run.evaluate(pope_config(files, **changes), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**row, "category": None} for row in POPE_ROWS], "categories .None., labels of"),
        (POPE_ROWS[:2], "2 questions of category random, but 4 labels.*not on a subset"),
        ([{**POPE_ROWS[0], "category": {}}, *POPE_ROWS[1:]], "row 1: field 'category' must be str"),
        ([{**row, "image": f"x{row['image']}"} for row in POPE_ROWS], "row 1 asks"),
    ],
)
def test_questions_that_do_not_fit_their_labels_are_refused_beforehand(
    files: pathlib.Path, tmp_path: pathlib.Path, monkeypatch, rows, message: str
) -> None:
    monkeypatch.setattr(Llava, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    questions = write_lines(tmp_path / "questions.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        run.evaluate(pope_config(files, questions=str(questions)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_wrong_image_folder_and_deep_json_are_named(files, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Llava, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(FileNotFoundError, match="none of the images of .*questions.jsonl is in"):
        run.evaluate(pope_config(files, images=str(files / "labels")), tmp_path / "run")
    deep = tmp_path / "deep.jsonl"
    deep.write_text('{"question_id": ' + "[" * 100_000 + "\n")
    with pytest.raises(ValueError, match="deep.jsonl row 1: nested too deeply"):
        run.evaluate(pope_config(files, questions=str(deep)), tmp_path / "run")


def test_the_digits_and_own_questions_need_no_name(files: pathlib.Path) -> None:
    config = eval_config.get_config()
    (task,) = run.parse_config(config).tasks
    assert task.benchmark.name == "digits"
    assert run.parse_config(config).decoding_for(task.benchmark).position_ids == "original"
    config.questions = str(files / "questions.jsonl")
    (task,) = run.parse_config(config).tasks
    assert task.benchmark.name == "questions"
    assert run.parse_config(config).decoding_for(task.benchmark).position_ids == "compact"


def metrics_of(folder: pathlib.Path) -> dict[str, float | None]:
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.slow
def test_own_questions_are_answered_and_images_from_elsewhere_are_not_read(
    files: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (50, 50), (9, 9, 90)).save(tmp_path / "images" / "in.png")
    Image.new("RGB", (50, 50), (9, 9, 90)).save(tmp_path / "out.png")
    os.symlink("../out.png", tmp_path / "images" / "link.png")
    os.symlink("in.png", tmp_path / "images" / "inner.png")
    names = [
        "in.png",
        "../out.png",
        str(tmp_path / "out.png"),
        "link.png",
        "nul\0.png",
        "inner.png",
    ]
    rows: list[dict[str, Any]] = [
        {"question_id": number, "image": name, "text": "What is this?"}
        for number, name in enumerate(names)
    ]
    rows.append({"question_id": 6, "text": "Who are you?"})
    questions = write_lines(tmp_path / "questions.jsonl", rows)
    config = pope_config(
        files,
        questions=str(questions),
        images=str(tmp_path / "images"),
        annotations=None,
        benchmark=None,
    )
    assert run.evaluate(config, tmp_path / "run") == run.SOME_FAILED
    answers = (tmp_path / "run" / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["question_id"] for line in answers] == [0, 5, 6]
    errors = [
        json.loads(line) for line in (tmp_path / "run" / "errors.jsonl").read_text().splitlines()
    ]
    assert [error["question_id"] for error in errors] == [1, 2, 3, 4]
    for error in errors[:3]:
        assert f"is outside of {tmp_path / 'images'}" in error["error"]
    assert "not a usable path" in errors[3]["error"]
    metrics = metrics_of(tmp_path / "run")
    assert metrics["rows_failed"] == 4
    assert not any(name.startswith("accuracy") for name in metrics)


@pytest.mark.slow
def test_images_and_questions_per_second_are_told_apart(
    files: pathlib.Path, tmp_path: pathlib.Path, capsys
) -> None:
    assert run.evaluate(pope_config(files, chip="h100"), tmp_path) == run.ALL_ANSWERED
    metrics = metrics_of(tmp_path)
    # Four questions about two images.
    ratio = metrics["questions_per_second"] / metrics["images_per_second"]
    assert ratio == pytest.approx(2)
    assert "of the floor of one h100" in capsys.readouterr().out
    page = (tmp_path / "report.html").read_text()
    assert "1 x cpu" in page  # the devices that ran it, of eight


@pytest.mark.slow
def test_failures_after_the_answers_cost_their_own_file(
    files: pathlib.Path, tmp_path: pathlib.Path, monkeypatch, capsys
) -> None:
    def broken(*_: Any) -> None:
        raise OSError(28, "No space left on device", "x.png")

    monkeypatch.setattr(summary, "overlays", broken)
    assert run.evaluate(pope_config(files), tmp_path) == run.NOT_WRITTEN
    assert metrics_of(tmp_path)["accuracy_random"] is not None
    assert "report.html was not written: OSError: [Errno 28]" in capsys.readouterr().err
    monkeypatch.undo()
    assert run.evaluate(pope_config(files), tmp_path) == run.ALL_ANSWERED
    assert metrics_of(tmp_path)["questions_per_second"] is None  # nothing was answered twice


@pytest.mark.slow
def test_a_full_disk_ends_the_run_in_one_line_and_it_resumes(
    files: pathlib.Path, tmp_path: pathlib.Path, monkeypatch
) -> None:
    real_write, written = os.write, []

    def full(descriptor: int, data: bytes) -> int:
        if written and b'"index"' in bytes(data):
            real_write(descriptor, bytes(data)[:20])
            raise OSError(28, "No space left on device")
        written.append(data)
        return real_write(descriptor, data)

    monkeypatch.setattr(runner, "COMMIT_ROWS", 1)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"No space left on device: .*journal\.jsonl"):
        run.evaluate(pope_config(files), tmp_path)
    monkeypatch.setattr(os, "write", real_write)
    assert (tmp_path / "journal.jsonl").read_bytes().count(b"\n") == 1
    assert run.evaluate(pope_config(files), tmp_path) == run.ALL_ANSWERED
    assert metrics_of(tmp_path)["rows_failed"] == 0


@pytest.mark.slow
def test_without_openpyxl_mmbench_is_scored_and_only_the_upload_is_left_out(
    files: pathlib.Path, tmp_path: pathlib.Path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    image = base64.b64encode((files / "images" / "0.png").read_bytes()).decode()
    table = tmp_path / "table.tsv"
    table.write_text(
        "index\tquestion\thint\tA\tB\tC\tD\tanswer\timage\n"
        f"1\tWhat?\tnan\ta cat\ta dog\t\t\tA\t{image}\n"
    )
    config = pope_config(files, benchmark="mmbench", questions=str(table), annotations=None)
    assert run.evaluate(config, tmp_path / "run") == run.ALL_ANSWERED
    assert metrics_of(tmp_path / "run")["accuracy_circular"] in (0, 100)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        *("answers.jsonl", "errors.jsonl", "journal.jsonl", "metrics.json", "report.html"),
    ]
    said = capsys.readouterr().out
    assert said.count("mmbench: no upload file: the MMBench server takes a spreadsheet") == 2
    assert said.startswith("mmbench: no upload file")
