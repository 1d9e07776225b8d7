"""Benchmarks on models whose images have several crops, and on videos."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest
from ml_collections import ConfigDict
from PIL import Image

import prumerge_jax.digits.benchmark  # noqa: F401  # registers itself
from configs import eval as eval_config
from prumerge_jax.evaluation import run
from prumerge_jax.models.config import LlavaConfig
from tests.tiny_llava import CONFIG, write_tiny_llava

SIDE = CONFIG.vision.image_size
NEXT = dataclasses.replace(
    CONFIG,
    family="llava_next",
    image_newline=True,
    image_grid_pinpoints=((SIDE, 2 * SIDE), (2 * SIDE, SIDE), (2 * SIDE, 2 * SIDE)),
)
VIDEO = dataclasses.replace(
    CONFIG, family="video_llava", video_tower=True, chat_template="llava_v1"
)


def evaluation(folder: pathlib.Path, model: LlavaConfig, **fields: Any) -> ConfigDict:
    config = eval_config.get_config()
    config.engine.update({"batch_size": 8, "window_size": 16, "slots": 4})
    config.decoding.max_new_tokens = 3
    config.checkpoint = str(write_tiny_llava(folder / "model", model))
    config.images = str(folder)
    config.update(fields)
    return config


def lines_of(file: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_questions_about_images_of_several_crops(tmp_path: pathlib.Path) -> None:
    rows = []
    for number, size in enumerate(((60, 20), (90, 80))):
        Image.new("RGB", size, (200 * number, 0, 90)).save(tmp_path / f"{number}.png")
        rows.append({"question_id": number, "image": f"{number}.png", "text": "What is this?"})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    questions = str(tmp_path / "q.jsonl")
    fields = {"questions": questions, "reduction": "prumerge", "baselines": True}
    config = evaluation(tmp_path, NEXT, **fields)
    assert run.evaluate(config, tmp_path / "run") == run.ALL_ANSWERED
    # No smaller image: it would be cut into tiles of the tower's size.
    ran = {path.parent.name for path in tmp_path.glob("run/*/*/answers.jsonl")}
    assert ran == {"prumerge", "prumerge_ranking=random", "prumerge_ranking=uniform"}
    config.reduction = "prumerge downsample:2"
    with pytest.raises(ValueError, match="downsample:2: .* expected a reduction that reduces each"):
        run.evaluate(config, tmp_path / "refused")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "patches are kept of 3 crops" in page
    assert "patches are kept of 5 crops" in page


@pytest.mark.slow
def test_questions_about_videos(tmp_path: pathlib.Path) -> None:
    asked, truths = [], []
    for number in range(3):
        name = f"vid{number}"
        if number < 2:  # the third is missing
            frames = [Image.new("RGB", (30, 20), (20 * f, 90, 70 * number)) for f in range(10)]
            frames[0].save(tmp_path / f"{name}.gif", save_all=True, append_images=frames[1:])
        asked.append({"video_name": name, "question": "What is this?", "question_id": number})
        truths.append({"answer": "a cat", "question_id": number})
    (tmp_path / "test_q.json").write_text(json.dumps(asked))
    (tmp_path / "test_a.json").write_text(json.dumps(truths))
    fields = {
        "benchmark": "msvd_qa",
        "questions": str(tmp_path / "test_q.json"),
        "annotations": str(tmp_path / "test_a.json"),
        "reduction": "prumerge:temporal=0.9",
    }
    config = evaluation(tmp_path, VIDEO, **fields)
    assert run.evaluate(config, tmp_path / "run") == run.SOME_FAILED
    answered = lines_of(tmp_path / "run" / "answers.jsonl")
    assert [row["question_id"] for row in answered] == [0, 1]
    (error,) = lines_of(tmp_path / "run" / "errors.jsonl")
    assert "vid2: no such file; expected a folder of frames" in error["error"]
    assert "patches are kept of 8 frames" in (tmp_path / "run" / "report.html").read_text()
    other = evaluation(tmp_path / "other", CONFIG, **fields, images=str(tmp_path))
    with pytest.raises(ValueError, match=r"msvd_qa asks about videos, and LLaVA-1\.5 takes images"):
        run.evaluate(other, tmp_path / "refused")
