"""The direction of imports between rooms: the contract holds, and a circle would be seen."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_imports_point_one_way_and_a_circle_is_seen(tmp_path: pathlib.Path) -> None:
    no_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "prumerge_jax", tmp_path / "prumerge_jax", ignore=no_caches)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    status, report = lint(tmp_path)
    assert status == 0, report
    planted = tmp_path / "prumerge_jax" / "store" / "planted.py"
    planted.write_text("from prumerge_jax.llava import Llava\n")
    status, report = lint(tmp_path)
    assert status != 0
    assert "prumerge_jax.store is not allowed to import prumerge_jax.llava" in report


def lint(folder: pathlib.Path) -> tuple[int, str]:
    """Status and report of the command that CI runs, in a separate folder."""
    code = "import importlinter.cli; importlinter.cli.lint_imports_command()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--no-cache"],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(folder)},
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr
