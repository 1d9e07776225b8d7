"""README and docs: what they name exists, and the notebook runs."""

import pathlib
import re
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from prumerge_jax.cli import recipes

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FLAG = re.compile(r"--(?:no)?config\.([a-z_0-9.]*[a-z_0-9])")
RECIPE = re.compile(r"--config[= ](?:configs/)?([a-z_0-9/]+)")
# Names of folders that a page writes for any file of them.
ANY = {"configs/NAME.py"}


def fields(config: ConfigDict, prefix: str = "") -> set[str]:
    found = set()
    for key in config:
        found.add(prefix + key)
        if isinstance(config[key], ConfigDict):
            found |= fields(config[key], f"{prefix}{key}.")
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_local_links_lead_somewhere(page: pathlib.Path) -> None:
    targets = [target.partition("#")[0] for target in LINK.findall(page.read_text("utf-8"))]
    local = [target for target in targets if target and "://" not in target]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_are_fields_of_a_recipe(page: pathlib.Path) -> None:
    known = set().union(*(fields(recipes.load(name)) for name in recipes.names()))
    named = set(FLAG.findall(page.read_text("utf-8")))
    assert named <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_recipes_and_files_that_are_named_exist(page: pathlib.Path) -> None:
    text = page.read_text("utf-8")
    for recipe in RECIPE.findall(text):
        assert recipe in recipes.names() or recipe.endswith("/")  # a variable of the shell follows
    for file in set(re.findall(r"\bconfigs/[\w/]+\.py\b", text)) - ANY:
        assert (ROOT / file).is_file()
    for file in re.findall(r"\bbenchmarks/\w+\.py\b", text):
        assert (ROOT / file).is_file()


def test_the_readme_is_short_and_its_commands_are_the_ones_that_ci_runs() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 130
    setup = 'python3 -m venv .venv && .venv/bin/pip install -q -e ".[test]" && '
    tests = [line for line in text.splitlines() if "python -m pytest" in line]
    assert tests == [f"{setup}.venv/bin/python -m pytest -q -n auto --dist loadfile"]
    assert (ROOT / "docs" / "images" / "overlay.png").stat().st_size < 150_000


def test_every_reduction_and_benchmark_of_the_readme_is_known() -> None:
    import prumerge_jax.digits.benchmark  # noqa: F401, registers itself
    from prumerge_jax import reductions
    from prumerge_jax.evaluation.benchmarks.registry import benchmark

    text = (ROOT / "README.md").read_text("utf-8")
    table = text.partition("## Reductions")[2].partition("## Benchmarks")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    spellings = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(spellings) >= 10
    for spelling in spellings:
        reductions.parse(spelling)
    listed = text.partition("## Benchmarks")[2].partition("## Further reading")[0]
    names = re.findall(r"`(\w+)`", listed)
    assert len(names) >= 13
    assert [benchmark(name).name for name in names] == names


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    sorted(
        {
            m
            for page in PAGES
            for m in re.findall(r"python -m (prumerge_jax[\w.]*)", page.read_text())
        }
    ),
)
def test_modules_that_are_named_as_programs_are_programs(module: str) -> None:
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "--" in done.stdout


@pytest.mark.slow
def test_the_readmes_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(compile(snippet, "README.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert printed[0].startswith("full")


@pytest.mark.slow
def test_the_notebook_runs() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in cells), "outputs are stripped"
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}
    ).execute()
    texts = [str(output.get("text", "")) for cell in cells for output in cell.outputs]
    assert any("full: 6" in text for text in texts), "the digit in the east"
    assert any("of 144 patches are kept" in text for text in texts)
