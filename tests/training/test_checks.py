"""What a user can get wrong is said in one line, before anything expensive or lasting."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import ml_collections
import pytest

from configs import lora, prumerge_7b_lora
from configs.digits import contrastive
from configs.digits import lora as digits_lora
from prumerge_jax.conversion.miniature import model_directory
from prumerge_jax.store import model_directory as directories
from prumerge_jax.training.run import run
from prumerge_jax.training.workdir import StopFlag

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENTRY = {
    "id": 1,
    "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "x"}],
}


@pytest.fixture
def config(tmp_path: pathlib.Path) -> ml_collections.ConfigDict:
    """LoRA of the miniature on one sample of a LLaVA JSON."""
    config = lora.get_config()
    config.weights = "miniature"
    config.dtype = "float32"
    config.data.json_file = str(tmp_path / "own.json")
    config.data.directory = str(tmp_path / "cache")
    config.batch_size = 1
    config.run.mesh.update({"data": 1, "fsdp": 1, "tensor": 1})
    config.run.num_workers = 0
    (tmp_path / "own.json").write_text(json.dumps([ENTRY]))
    return config


def own_data_on_a_recipe_of_the_digits(config: ml_collections.ConfigDict) -> None:
    changed = digits_lora.get_config()
    changed.weights = "miniature"
    changed.data.name = "llava_json"
    changed.data.json_file = "own.json"
    config.update(changed.copy_and_resolve_references())


def captions_of_own_data(config: ml_collections.ConfigDict) -> None:
    data = config.data.copy_and_resolve_references()
    config.update(contrastive.get_config("tiny").copy_and_resolve_references())
    config.data.name, config.data.json_file = "llava_json", data.json_file


MISTAKES: dict[str, tuple[Callable[[ml_collections.ConfigDict], object], str]] = {
    "no weights": (lambda c: c.update({"weights": None}), "config.weights is not set; expected"),
    "no such weights": (lambda c: c.update({"weights": "nope"}), "nope: no such directory"),
    "no json": (lambda c: c.data.update({"json_file": ""}), "data.json_file is not set"),
    "no such json": (lambda c: c.data.update({"json_file": "gone.json"}), "gone.json: no such"),
    "own.json on digits": (own_data_on_a_recipe_of_the_digits, "own.json: no such file"),
    "captions of own data": (captions_of_own_data, "use configs/lora.py"),
    "few samples": (lambda c: c.update({"batch_size": 4}), "1 samples do not fill one batch of 4"),
    "mesh and devices": (lambda c: c.run.mesh.update({"data": 0, "tensor": 3}), "cannot be fitted"),
    "mesh and batch": (lambda c: c.run.mesh.update({"data": 2}), "batch_size is 1; expected a"),
    "objective": (lambda c: c.update({"objective": "next"}), "config.objective is 'next'"),
    "conversation": (lambda c: c.update({"conversation": "vicuna"}), "did you mean 'vicuna_v1'"),
    "reduction": (lambda c: c.update({"reduction": "prumerg"}), "prumerg"),
    "rows": (lambda c: c.update({"max_length": 4096}), "the model has 1024 positions"),
    "images": (lambda c: c.update({"max_length": 60}), "an image may have 144 visual tokens"),
    "rates": (
        lambda c: c.update({"learning_rates": (("tower.*", 1e-3),)}),
        "pattern 'tower.*' fits no weight",
    ),
    "nothing trains": (lambda c: c.update({"learning_rates": ()}), "learning_rates is empty"),
    "no adapters": (lambda c: c.adapter.update({"rank": 0}), "fits no weight; .* lora_b where"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_weights_are_hashed_or_a_file_is_written(
    config: ml_collections.ConfigDict,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    mistake: str,
) -> None:
    make, message = MISTAKES[mistake]
    make(config)
    before = set(tmp_path.iterdir())

    def verify(directory: object, *, hashes: bool) -> None:
        raise AssertionError("the weights were hashed")

    monkeypatch.setattr(directories, "verify", verify)
    with pytest.raises((ValueError, OSError), match=message) as error:
        run(config, tmp_path / "run", StopFlag())
    assert "\n" not in str(error.value)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("recipe", [prumerge_7b_lora, lora], ids=lambda recipe: recipe.__name__)
def test_a_recipe_without_weights_never_trains_random_ones(recipe, tmp_path: pathlib.Path) -> None:
    with pytest.raises(
        ValueError, match="config.weights is not set; .*'random' for random weights"
    ):
        run(recipe.get_config(), tmp_path / "run", StopFlag())
    assert not (tmp_path / "run").exists()


def test_a_pipe_as_tokenizer_is_refused(
    config: ml_collections.ConfigDict, tmp_path: pathlib.Path
) -> None:
    model = model_directory("miniature")
    own = tmp_path / "model"
    own.mkdir()
    for file in model.iterdir():
        if file.name != "tokenizer.model":
            (own / file.name).symlink_to(file)
    os.mkfifo(own / "tokenizer.model")
    config.weights = str(own)
    with pytest.raises(ValueError, match="tokenizer.model: no such file, or not a regular file"):
        run(config, tmp_path / "run", StopFlag())


@pytest.mark.slow
def test_train_py_says_it_in_one_line_and_exits_with_1(tmp_path: pathlib.Path) -> None:
    command = [
        sys.executable, "train.py", "--config=configs/lora.py", f"--workdir={tmp_path / 'run'}",
        "--config.weights=miniature", f"--config.data.json_file={tmp_path / 'own.json'}",
        f"--config.data.image_folder={tmp_path}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == f"train.py: {tmp_path / 'own.json'}: no such file"
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_own_data_trains_by_flags_alone(tmp_path: pathlib.Path) -> None:
    (tmp_path / "own.json").write_text(json.dumps([ENTRY | {"id": index} for index in range(4)]))
    command = [
        sys.executable, "train.py", "--config=configs/lora.py", f"--workdir={tmp_path / 'run'}",
        "--config.weights=miniature", f"--config.data.json_file={tmp_path / 'own.json'}",
        f"--config.data.directory={tmp_path / 'cache'}", "--config.batch_size=2",
        "--config.dtype=float32", "--config.max_length=256", "--config.reduction=prumerge",
        "--config.run.mesh.data=1", "--config.run.mesh.fsdp=1",
        "--config.adapter.rank=4", "--config.run.num_workers=0", "--config.run.log_every=1",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["loss"] > 0 for line in lines)
    directories.verify(tmp_path / "run" / "model")
