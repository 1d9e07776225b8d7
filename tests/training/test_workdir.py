"""One run per directory, always with the same configuration."""

import json
import pathlib

import pytest

from prumerge_jax.training.workdir import (
    WorkdirError,
    check_config,
    claim_workdir,
    write_config,
)

CONFIG = {"seed": 1, "optimizer": {"b1": 0.9}, "learning_rates": [["*", 0.1]], "run": {"keep": 2}}


def test_the_same_configuration_resumes_and_run_may_differ(tmp_path: pathlib.Path) -> None:
    check_config(tmp_path, CONFIG)  # none of these raises, nor writes
    assert not list(tmp_path.iterdir())
    write_config(tmp_path, CONFIG)
    check_config(tmp_path, CONFIG)
    check_config(tmp_path, CONFIG | {"run": {"keep": 5, "mesh": {"data": 8}}})
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG


def test_another_configuration_is_refused_field_by_field(tmp_path: pathlib.Path) -> None:
    write_config(tmp_path, CONFIG)
    changed = CONFIG | {"optimizer": {"b1": 0.8}, "learning_rates": [], "extra": None}
    with pytest.raises(WorkdirError) as error:
        check_config(tmp_path, changed)
    message = str(error.value)
    assert "optimizer.b1: 0.9 before, 0.8 now" in message
    assert "learning_rates: [['*', 0.1]] before, [] now" in message
    assert "extra: 'absent' before, None now" in message
    assert "seed" not in message


def test_a_directory_of_other_things_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(WorkdirError, match=r"holds \['thesis.tex'\] but no run"):
        check_config(tmp_path, CONFIG)


def test_a_second_run_is_refused(tmp_path: pathlib.Path) -> None:
    with (
        claim_workdir(tmp_path / "run"),
        pytest.raises(WorkdirError, match="in use by another run"),
        claim_workdir(tmp_path / "run"),
    ):
        pass
    with claim_workdir(tmp_path / "run"):
        pass
