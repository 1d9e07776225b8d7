"""Flags, recipes by name, and mistakes in one line: the programs as a user starts them."""

import dataclasses
import pathlib
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from absl import flags
from PIL import Image

import prumerge_jax
from prumerge_jax import reductions
from prumerge_jax.cli import command_line, convert, evaluate, recipes, train, visualize
from tests.evaluation.report.test_overlay import small_case

ROOT = pathlib.Path(__file__).resolve().parents[1]
MAIN = {
    "train.py": train.main,
    "eval.py": evaluate.main,
    "convert_weights.py": convert.main,
    "prumerge-visualize": visualize.main,
}
PUBLISHED = "--config=prumerge_7b_lora"


def said(program: str, *arguments: str) -> str:
    """The one line with which a program refuses its arguments."""
    with pytest.raises(SystemExit) as stopped:
        MAIN[program]([f"/somewhere/{program}", *arguments])
    line = stopped.value.code  # a string: Python prints it to stderr and exits with status 1
    assert isinstance(line, str)
    assert "\n" not in line
    name, _, message = line.partition(": ")
    assert name == program
    return message


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "eval.py --workdir=x --config.reductions=full",
            "unknown flag --config.reductions; did you mean --config.reduction?",
        ),
        ("eval.py --workdri=x", "unknown flag --workdri; did you mean --workdir?"),
        (
            "eval.py --config.decoding.temprature=1",
            "unknown flag --config.decoding.temprature; "
            "did you mean --config.decoding.temperature?",
        ),
        ("eval.py --reduction=full", "unknown flag --reduction; did you mean --config.reduction?"),
        ("eval.py --zzz", "unknown flag --zzz; --help lists all flags"),
        ("train.py --confg=configs/eval.py", "unknown flag --confg; did you mean --config?"),
        (
            f"train.py --workdir=x {PUBLISHED} --config.bach_size=8",
            "unknown flag --config.bach_size; did you mean --config.batch_size?",
        ),
        ("convert_weights.py --inptu=x", "unknown flag --inptu; did you mean --input?"),
        ("prumerge-visualize --imagee=x", "unknown flag --imagee; did you mean --image?"),
        (
            f"train.py --workdir=x {PUBLISHED} --config.batch_size=abc",
            "--config.batch_size=abc: expected an integer",
        ),
        (
            f"train.py --workdir=x {PUBLISHED} --config.optimizer.b1=abc",
            "--config.optimizer.b1=abc: expected a number",
        ),
        (
            f"train.py --workdir=x {PUBLISHED} --config.run.verify_weights=2",
            "--config.run.verify_weights=2: expected true or false",
        ),
        (
            f"train.py --workdir=x {PUBLISHED} --num_processes=two",
            "--num_processes=two: expected an integer",
        ),
        (
            "convert_weights.py --input=x --output=y --to=onnx",
            "--to=onnx: value should be one of <jax|hf|llava|peft>",
        ),
        ("eval.py", "give one of --workdir=DIR and --aot=SLICE"),
        ("eval.py --workdir=", "give one of --workdir=DIR and --aot=SLICE"),
        ("eval.py --workdir=x --aot=v5e:2x4", "give one of --workdir=DIR and --aot=SLICE"),
        (f"train.py {PUBLISHED}", "give one of --workdir=DIR and --aot=SLICE"),
        (
            "eval.py --workdir=x reduction=full",
            "unexpected argument 'reduction=full'; flags are written --name=value",
        ),
        ("eval.py --workdir", "Missing value for flag --workdir"),
        ("eval.py --config", "--config has no value; expected a recipe's name or file"),
        (
            "train.py --config=prumerge_7b_lore",
            "--config prumerge_7b_lore: no recipe of that name, and no .py file; "
            "did you mean prumerge_7b_lora?",
        ),
        ("train.py --config=missing.py --workdir=x", "--config missing.py: no such file"),
        (
            "train.py --config=prumerge_7b_lora:tiny --workdir=x",
            "--config prumerge_7b_lora:tiny: the recipe takes no argument",
        ),
        ("convert_weights.py --output=x", "give one of --input and --download"),
        ("convert_weights.py --input=x --download=a/b --output=y", "give one of --input and"),
        ("convert_weights.py --input=x", "--output is missing"),
        ("convert_weights.py --input=x --output=y --revision=0", "--revision is the commit of"),
        ("convert_weights.py --input=x --output=y --to=peft --merge", "--to=peft takes no --merge"),
        (
            "convert_weights.py --input=x --output=y --to=hf --dtype=float16 --adapter_base=z",
            "--to=hf takes no --dtype --adapter_base",
        ),
        ("convert_weights.py --input=x --output=y --merge", "--merge is about an adapter"),
        (
            "convert_weights.py --download=a/b --output=y --to=llava",
            "--to=llava takes no --download",
        ),
        ("prumerge-visualize --image=x --output=y.png", "--checkpoint is missing"),
        (
            "prumerge-visualize --checkpoint=miniature --image=x --output=y.jpg",
            "--output y.jpg does not end in .png",
        ),
        (
            "prumerge-visualize --checkpoint=miniature --image=x --output=missing/y.png",
            "--output missing/y.png: no such folder",
        ),
    ],
)
def test_a_mistake_is_one_line(command: str, message: str) -> None:
    assert said(*command.split()).startswith(message)


def test_without_a_recipe_the_published_ones_are_named() -> None:
    message = said("train.py", "--workdir=x")
    assert message.startswith("--config is missing")
    assert all(name in message for name in recipes.names())


def test_long_values_are_cut() -> None:
    for argument in ("--config=" + 5000 * "a", "--" + 5000 * "b", 5000 * "c"):
        assert len(said("eval.py", "--workdir=x", argument)) < 500
    assert len(said("train.py", PUBLISHED, "--config.batch_size=" + 5000 * "d")) < 200


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:", "line 1: invalid syntax"),
        ("import ml_collections\n\n1 / 0", "line 3: ZeroDivisionError: division by zero"),
        ("def get_config():\n    return missing", "line 2: NameError: name 'missing'"),
        ("from configs import commons", "cannot import name 'commons'"),
        ("x = 1", "defines no function get_config"),
        ("def get_config():\n    return {}", "get_config returned dict, not a ConfigDict"),
        ("def get_config(mode):\n    return {}", "the recipe needs an argument after a colon"),
        ("x = '\udcff'", "SyntaxError|line 1"),
    ],
)
def test_a_broken_recipe_is_named_with_its_line(
    tmp_path: pathlib.Path, text: str, message: str
) -> None:
    file = tmp_path / "mine.py"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    line = said("train.py", f"--config={file}", "--workdir=x")
    assert "mine.py" in line
    assert any(part in line for part in message.split("|"))


def test_every_field_is_a_flag() -> None:
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    config = command_line.parse_with_config(
        [
            "train.py",
            "--config.seed=1",
            "--config=prumerge_7b_lora",
            "--config=digits/lora:tiny",
            "--config.learning_rates=(('projector.*', 1e-5),)",
            "--config.adapter.rank=8",
            "--config.weights=/models/llava",
            "--config.optimizer.clip_norm=0.5",
            "--noconfig.group_by_modality_length",
            "--config.run.mesh.tensor",
            "2",
            "--workdir=runs/x",
            "--config.seed=3",
        ],
        values,
        "",
    )
    assert config.learning_rates == (("projector.*", 1e-5),)
    assert (config.adapter.rank, config.weights, config.seed) == (8, "/models/llava", 3)
    assert (config.optimizer.clip_norm, config.run.mesh.tensor) == (0.5, 2)
    assert (config.steps, config.group_by_modality_length) == (4, False)
    assert values["workdir"].value == "runs/x"
    with pytest.raises(AttributeError, match="locked"):
        config.another = 1


def test_a_flagfile_may_name_the_recipe(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "flags"
    file.write_text("--config=digits/lora:tiny\n--config.seed=5\n")
    command = ["train.py", f"--flagfile={file}"]
    config = command_line.parse_with_config(command, flags.FlagValues(), "")
    assert (config.steps, config.seed) == (4, 5)


def test_recipes_by_name_equal_their_files() -> None:
    names = recipes.names()
    assert {"eval", "prumerge_7b_lora", "digits/lora"} <= set(names)
    assert not {"common", "digits/miniature"} & set(names)
    for name in names:
        file = recipes.FOLDER / f"{name}.py"
        assert recipes.load(name).to_json() == recipes.load(str(file)).to_json()
    assert recipes.load("digits/lora:tiny").steps == 4


@pytest.mark.parametrize("program", MAIN)
@pytest.mark.parametrize("flag", ["--help", "-h", "--helpfull"])
def test_help_lists_the_flags(program: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        MAIN[program]([program, flag])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    expected = {
        "train.py": ["--workdir", "--coordinator", "prumerge_7b_lora"],
        "eval.py": ["--workdir", "--config.decoding.temperature=0.0", "--config.mesh.fsdp=1"],
        "convert_weights.py": ["--vision_tower", "--to", "peft"],
        "prumerge-visualize": ["--reduction", "(default: prumerge)"],
    }[program]
    assert all(word in out for word in expected)


def test_help_of_a_recipe_lists_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["train.py", "--config=digits/lora:tiny", "--help"])
    assert "--config.adapter.rank=16" in capsys.readouterr().out


def ended(main: Callable[..., int | None]) -> object:
    with pytest.raises(SystemExit) as stopped:
        command_line.run(main, ["prog"])
    return stopped.value.code


def raising(error: BaseException) -> Callable[..., int | None]:
    def main(argv: object) -> int:
        raise error

    return main


def test_what_input_and_machine_do_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    full = OSError(28, "No space left on device", "answers.jsonl")
    assert ended(raising(full)) == "prog: [Errno 28] No space left on device: 'answers.jsonl'"
    assert ended(raising(ValueError("row 3:\n  no image"))) == "prog: row 3: no image"
    assert ended(raising(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"))).startswith("prog: ")
    assert ended(raising(ModuleNotFoundError("No module named 'torch'"))).startswith("prog: No")
    assert ended(raising(ValueError())) == "prog: ValueError"
    assert ended(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "prog: interrupted\n"
    assert ended(lambda argv: 3) == 3
    assert ended(lambda argv: None) is None


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(KeyError):
        command_line.run(raising(KeyError("a bug")), ["prog"])


@dataclasses.dataclass
class Explanation:
    pixels: np.ndarray
    patch_indices: np.ndarray
    assignment: np.ndarray


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Stands in for the model; lists what the command asked of it."""
    calls: list[object] = []

    class Llava:
        @classmethod
        def load(cls, directory):
            calls.append(directory)
            return cls()

        def explain(self, image, *, reduction, question=None):
            calls.append((image.size, reduction))
            return Explanation(*small_case())

    monkeypatch.setattr(prumerge_jax, "Llava", Llava, raising=False)
    return calls


def test_visualize_writes_the_overlay_of_the_model(
    tmp_path: pathlib.Path, loaded: list[object]
) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "photo.png")
    output = tmp_path / "out.png"
    arguments = ["--checkpoint=weights", f"--image={tmp_path / 'photo.png'}", f"--output={output}"]
    with pytest.raises(SystemExit) as stopped:
        visualize.main(["prumerge-visualize", *arguments, "--reduction=prumerge+:neighbours=8"])
    assert stopped.value.code is None
    assert loaded == [
        pathlib.Path("weights"),
        ((20, 20), reductions.parse("prumerge+:neighbours=8")),
    ]
    with Image.open(output) as written:
        width, height = written.size
    assert width > 2.5 * height > 1000


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--output=out.jpg", "--output out.jpg does not end in .png"),
        ("--output=missing/out.png", "no such folder"),
        ("--reduction=prumerg", "unknown reduction 'prumerg'; did you mean 'prumerge'?"),
        ("--reduction=prumerge:neighbours=x", "neighbours is 'x'; expected an integer"),
        ("--reduktion=full", "unknown flag --reduktion; did you mean --reduction?"),
        ("--image=photo.txt", "photo.txt: not a readable image"),
        ("--image=nowhere.png", "nowhere.png"),
        ("full", "unexpected argument 'full'"),
    ],
)
def test_visualize_finds_mistakes_before_loading(
    tmp_path: pathlib.Path,
    loaded: list[object],
    monkeypatch: pytest.MonkeyPatch,
    argument: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 20)).save("photo.png")
    pathlib.Path("photo.txt").write_text("no image")
    usual = ["--checkpoint=weights", "--image=photo.png", "--output=out.png"]
    assert message in said("prumerge-visualize", *usual, argument)
    assert loaded == []


def test_visualize_names_a_missing_checkpoint(tmp_path: pathlib.Path) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "photo.png")
    arguments = [f"--image={tmp_path / 'photo.png'}", f"--output={tmp_path / 'out.png'}"]
    assert "nowhere" in said("prumerge-visualize", *arguments, "--checkpoint=/nowhere")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "eval.py", "convert_weights.py"])
def test_the_scripts_say_it_on_stderr_and_fast(script: str, tmp_path: pathlib.Path) -> None:
    command = [sys.executable, "-X", "importtime", str(ROOT / script), "--workdirr=x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    imports, lines = [], []
    for line in done.stderr.splitlines():
        (imports if line.startswith("import time:") else lines).append(line)
    assert len(lines) == 1
    assert lines[0].startswith(f"{script}: unknown flag --workdirr")
    assert not any(line.endswith((" jax", " orbax")) for line in imports)
