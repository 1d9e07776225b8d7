"""`python -m prumerge_jax.cli.checks`."""

import json
import pathlib

import numpy as np
import pytest

from prumerge_jax import reductions
from prumerge_jax.cli import checks
from tests.tiny_llava import write_tiny_llava


@pytest.mark.parametrize("name", checks.REDUCTIONS)
def test_every_check_names_reductions(name: str) -> None:
    assert len(reductions.parse_list(checks.REDUCTIONS[name])) >= 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workdir=x"], "--check is missing: one of attention"),
        (["--workdir=x", "--check=counts"], "--check counts: expected one of attention"),
        (["--check=minimum"], "--workdir is missing"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        checks.main(["checks.py", *arguments])


@pytest.mark.slow
def test_adaptation_shows_where_two_models_look(tmp_path: pathlib.Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        checks.main(
            ["checks.py", "--check=adaptation", f"--workdir={tmp_path}", "--scenes=2",
             "--reduction=full"]
        )  # fmt: skip
    assert not ended.value.code, ended.value.code
    assert "on digits x, miniature-any-budget" in capsys.readouterr().out
    found = json.loads((tmp_path / "adaptation.json").read_text())["full"]
    for figures in found.values():
        assert len(figures["visual"]) == 3
        assert 0 < min(figures["visual"]) <= max(figures["visual"]) < 1
    before, after = (np.array(each["visual"]) for each in found.values())
    assert abs(before - after).max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("check", ["weight", "robustness"])
def test_a_check_prints_its_table(tmp_path: pathlib.Path, capsys, check: str) -> None:
    model = write_tiny_llava(tmp_path / "tiny")
    with pytest.raises(SystemExit) as ended:
        checks.main(
            ["checks.py", f"--check={check}", f"--workdir={tmp_path / 'run'}", "--scenes=2",
             f"--checkpoint={model}", "--reduction=full prumerge"]
        )  # fmt: skip
    assert not ended.value.code, ended.value.code
    out = capsys.readouterr().out
    if check == "weight":
        assert "below_16" in out
        assert "cover_tokens=18_merge=mean" in out
    else:
        header = next(line for line in out.splitlines() if line.startswith("accuracy, % of clean"))
        assert header.split()[-5:] == ["clean", "noise", "blur", "clutter", "contrast"]
