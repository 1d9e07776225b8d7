"""lmms-eval's own command line with the miniature on a local task, against eval.py."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from PIL import Image

from prumerge_jax.digits.benchmark import (
    ANNOTATIONS_FILE,
    IMAGE_FOLDER,
    QUESTIONS_FILE,
    write_files,
)
from prumerge_jax.evaluation import jsonfiles

pytest.importorskip("lmms_eval", reason="needs lmms-eval: an environment with the extra lmms")
datasets = pytest.importorskip("datasets")

pytestmark = pytest.mark.slow

SCENES = 12
REDUCED = "prumerge:neighbours=8,capacity=72"  # with a comma, at which lmms-eval splits
FLAGS = "checkpoint=miniature,position_ids=original"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}

TASK = """
task: {name}
dataset_path: {folder}/dataset
dataset_kwargs: {{load_from_disk: true}}
test_split: test
doc_to_visual: !function utils.visual
doc_to_target: answer
{rest}
metadata: [{{version: 0.0}}]
"""
GENERATE = """output_type: generate_until
doc_to_text: text
generation_kwargs: {max_new_tokens: 32, until: ["\\n\\n"]}
process_results: !function utils.results
metric_list: [{metric: right, aggregation: mean, higher_is_better: true}]"""
UTILS = """
from prumerge_jax.digits.benchmark import is_right


def visual(document):
    return [document["image"].convert("RGB")]


def results(document, answers):
    right = is_right(document["category"], answers[0], document["answer"])
    return {"right": float(right)}
"""


def run(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **OFFLINE},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pathlib.Path]:
    """Workdirs of eval.py by reduction."""
    workdirs = {}
    for reduction in ("full", REDUCED):
        workdirs[reduction] = tmp_path_factory.mktemp("ours")
        run(
            "eval.py", "--workdir", str(workdirs[reduction]), "--config.checkpoint=miniature",
            f"--config.digits.scenes={SCENES}", f"--config.reduction={reduction}",
        )  # fmt: skip
    return workdirs


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a task of eval.py's questions."""
    folder = tmp_path_factory.mktemp("tasks")
    made = folder / "questions"
    write_files(made, scenes=SCENES)
    rows = jsonfiles.read_jsonl(made / QUESTIONS_FILE)
    truths = {row["question_id"]: row for row in jsonfiles.read_jsonl(made / ANNOTATIONS_FILE)}
    documents = {
        "image": [Image.open(made / IMAGE_FOLDER / row["image"]) for row in rows],
        "answer": [truths[row["question_id"]]["answer"] for row in rows],
        **{name: [row[name] for row in rows] for name in ("question_id", "text", "category")},
    }
    dataset = datasets.Dataset.from_dict(documents)
    datasets.DatasetDict({"test": dataset}).save_to_disk(str(folder / "dataset"))
    (folder / "utils.py").write_text(UTILS)
    text = TASK.format(name="digits_generate", folder=folder, rest=GENERATE)
    (folder / "digits_generate.yaml").write_text(text)
    return folder


def evaluated(tasks: pathlib.Path, output: pathlib.Path, task: str, flags: str) -> tuple:
    """The results of a task, and its samples."""
    run(
        "-m", "lmms_eval", "--model", "prumerge_jax", "--model_args", f"{FLAGS},{flags}",
        "--tasks", task, "--include_path", str(tasks), "--batch_size", "8",
        "--output_path", str(output), "--log_samples",
    )  # fmt: skip
    # The command line exits with 0 after a failed evaluation: only the files tell.
    (results,) = output.rglob("*_results.json")
    (samples,) = output.rglob(f"*_samples_{task}.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(results.read_text())["results"][task], rows


@pytest.mark.parametrize("reduction", ["full", REDUCED])
def test_answers_are_those_of_eval(
    ours: dict[str, pathlib.Path], tasks: pathlib.Path, tmp_path: pathlib.Path, reduction: str
) -> None:
    spelling = reduction.replace(",", ";")
    results, samples = evaluated(tasks, tmp_path, "digits_generate", f"reduction={spelling}")
    answers = jsonfiles.read_jsonl(ours[reduction] / "answers.jsonl")
    assert [row["filtered_resps"] for row in samples] == [row["text"] for row in answers]
    metrics = json.loads((ours[reduction] / "metrics.json").read_text())
    families = [row["question_id"].rpartition("_")[2] for row in answers]
    right = sum(
        metrics[f"accuracy_{family}"] / 100 * families.count(family) for family in set(families)
    )
    assert results["right,none"] == pytest.approx(right / len(answers))
    # What it has not been trained on it answers badly, and in the same way.
    assert results["right,none"] > {"full": 0.9, REDUCED: 0.2}[reduction]
