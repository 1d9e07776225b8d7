"""`eval.py` as a user runs it: files, exit status, scoring of an answers file."""

import json
import pathlib
import subprocess

import pytest

from configs import eval as eval_config
from prumerge_jax.digits import benchmark as digits
from prumerge_jax.evaluation import run
from prumerge_jax.llava import Llava
from tests.programs import run_program
from tests.tiny_llava import write_tiny_llava


def run_eval(workdir: pathlib.Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return run_program("eval.py", f"--workdir={workdir}", *flags)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_tiny_llava(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.slow
def test_several_reductions_with_baselines(model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    out = run_eval(
        tmp_path,
        f"--config.checkpoint={model}",
        "--config.digits.scenes=3",
        "--config.reduction=full prumerge:neighbours=4",
        "--config.baselines",
        "--config.chip=h100",
    )
    assert out.returncode == 0, out.stderr
    names = {"full", "prumerge_neighbours=4", "downsample_2"}
    names |= {f"prumerge_neighbours=4_ranking={ranking}" for ranking in ("random", "uniform")}
    assert {path.name for path in (tmp_path / "digits").iterdir()} == names
    metrics = {
        name: json.loads((tmp_path / "digits" / name / "metrics.json").read_text())
        for name in names
    }
    ours = metrics["prumerge_neighbours=4"]
    assert metrics["full"]["visual_tokens_mean"] == 16
    assert 1 < ours["visual_tokens_mean"] < 16
    assert (
        metrics["prumerge_neighbours=4_ranking=random"]["visual_tokens_mean"]
        == ours["visual_tokens_mean"]
    )
    assert ours["images_per_second"] > 0
    assert "of the floor of one h100" in out.stdout
    page = (tmp_path / "report.html").read_text()
    assert "prumerge:neighbours=4" in page
    assert "number of digits" in page


@pytest.mark.parametrize(
    ("reduction", "message"),
    [
        ("full prumerg", "unknown reduction 'prumerg'; did you mean 'prumerge'"),
        ("full prumerge:neighbours=0", "neighbours is 0; expected an integer"),
        ("full,prumerge:neighbours=8", "several reductions are separated by a space"),
        ("", "no reduction is named"),
    ],
)
def test_every_reduction_is_checked_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, reduction: str, message: str
) -> None:
    monkeypatch.setattr(Llava, "load", lambda *_, **__: pytest.fail("the model was loaded"))
    config = eval_config.get_config()
    config.digits.scenes = 1
    config.reduction = reduction
    with pytest.raises(ValueError, match=message):
        run.evaluate(config, tmp_path)


@pytest.mark.slow
def test_a_bad_image_gives_status_3_and_the_rest(
    model: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    data = tmp_path / "data"
    digits.write_files(data, split="test", scenes=2)
    broken = sorted((data / digits.IMAGE_FOLDER).iterdir())[0]
    broken.write_bytes(b"")
    out = run_eval(
        tmp_path / "run",
        f"--config.checkpoint={model}",
        "--config.benchmark=digits",
        "--config.reduction=prumerge",
        f"--config.questions={data / digits.QUESTIONS_FILE}",
        f"--config.images={data / digits.IMAGE_FOLDER}",
        f"--config.annotations={data / digits.ANNOTATIONS_FILE}",
    )
    assert out.returncode == 3, out.stderr
    errors = (tmp_path / "run" / "errors.jsonl").read_text().splitlines()
    assert errors
    assert all(broken.name in line for line in errors)
    assert (tmp_path / "run" / "answers.jsonl").read_text()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["rows_failed"] == len(errors)


def test_an_answers_file_is_scored_without_a_model(
    golden: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    pope = golden / "pope"
    out = run_eval(
        tmp_path,
        "--config.benchmark=pope",
        f"--config.questions={pope / 'llava_pope_test.jsonl'}",
        f"--config.annotations={pope / 'labels'}",
        f"--config.answers={pope / 'answers_llava-v1.5-13b.jsonl'}",
    )
    assert out.returncode == 0, out.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["mean_f1"] == pytest.approx(85.947, abs=1e-3)
    assert metrics["f1_adversarial"] == pytest.approx(84.4587, abs=1e-4)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.benchmark=vqa9", "unknown benchmark 'vqa9'"),
        ("--config.benchmark=pope", "pope needs its question file"),
        ("--config.checkpoint=nowhere", "nowhere"),
        ("--config.checkpoint=", "no model to score"),
        ("--config.reduction=nucleus", "unknown reduction 'nucleus'"),
    ],
)
def test_what_cannot_run_says_why_in_one_line(
    model: pathlib.Path, tmp_path: pathlib.Path, flag: str, message: str
) -> None:
    flags = [f"--config.checkpoint={model}", "--config.digits.scenes=1", flag]
    out = run_eval(tmp_path, *flags)
    assert out.returncode == 1
    assert message in out.stderr.strip().splitlines()[-1]
