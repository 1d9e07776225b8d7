"""The installed package, outside a clone: built, installed and used from another folder."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Built from a copy, so that the checkout gets no build folder."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    no_caches = shutil.ignore_patterns("__pycache__")
    for package in ("prumerge_jax", "configs"):
        shutil.copytree(ROOT / package, source / package, ignore=no_caches)
    for file in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target)]
    subprocess.run([*command, str(source)], check=True, capture_output=True)
    (built,) = target.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def scripts(wheel: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Folder of the programs in a new environment with the wheel and this one's other packages."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    binary = folder / ("Scripts" if os.name == "nt" else "bin")
    python = binary / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    install = ["install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    command = [sys.executable, "-m", "pip", "--python", str(python), *install]
    subprocess.run(command, check=True, capture_output=True)
    # A path file is read after the environment's packages; those of an editable install of the
    # checkout are not, because path files of a folder that is added this way are not executed.
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (pathlib.Path(site) / "others.pth").write_text("\n".join(sorted(here)))
    return binary


def run(script: pathlib.Path, *arguments: str, cwd: pathlib.Path) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [script, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_the_wheel_has_one_top_level_name_and_all_data(wheel: pathlib.Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"prumerge_jax"}
    inside = {name.removeprefix("prumerge_jax/") for name in names}
    assert {"py.typed", "configs/prumerge_7b_lora.py", "configs/digits/lora.py"} <= inside
    assert any(name.endswith("/model.safetensors") for name in names)
    assert any(name.endswith("/tokenizer.model") for name in names)
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    source = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "prumerge_jax").rglob("*.py")
        if "__pycache__" not in path.parts
    }
    assert source <= set(names)


def test_five_scenes_are_scored_from_another_folder(
    scripts: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    done = run(
        scripts / "prumerge-eval",
        "--workdir=run",
        "--config.digits.scenes=5",
        "--config.reduction=prumerge:neighbours=8",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["rows_failed"] == 0
    assert 10 < metrics["visual_tokens_mean"] < 60
    assert (tmp_path / "run" / "report.html").is_file()


def test_a_published_recipe_trains_by_name(scripts: pathlib.Path, tmp_path: pathlib.Path) -> None:
    done = run(
        scripts / "prumerge-train",
        "--config=digits/lora:tiny",
        "--workdir=run",
        f"--config.data.directory={tmp_path / 'data'}",
        "--config.data.train_scenes=8",
        "--config.batch_size=4",
        "--config.run.rows_per_shard=2",
        "--config.steps=2",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_a_recipe_of_ones_own_builds_on_a_published_one(
    scripts: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "mine.py").write_text(
        "from configs import prumerge_7b_lora\n\n\n"
        "def get_config():\n"
        "    config = prumerge_7b_lora.get_config()\n"
        "    config.batch_size = 12\n"
        "    return config\n"
    )
    done = run(scripts / "prumerge-train", "--config=mine.py", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--config.batch_size=12" in done.stdout


def test_the_package_is_the_wheels_and_configs_is_no_name(
    scripts: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    code = (
        "import importlib.util, prumerge_jax; print(prumerge_jax.__file__);"
        "assert importlib.util.find_spec('configs') is None;"
        "model = prumerge_jax.Llava.load('miniature');"
        "from prumerge_jax.digits.scenes import draw_scene;"
        "scene = draw_scene('test', 1, seed=0);"
        "print(model.generate([scene.image], ['How many digits are there?'], reduction='full'))"
    )
    done = run(scripts / "python", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(ROOT) not in done.stdout


@pytest.mark.parametrize("program", ["train", "eval", "convert", "visualize"])
def test_every_program_names_itself(
    scripts: pathlib.Path, tmp_path: pathlib.Path, program: str
) -> None:
    done = run(scripts / f"prumerge-{program}", "--no_such_flag=1", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"prumerge-{program}: unknown flag --no_such_flag")
