"""What fewer bits cost: how two models are compared, and the miniature in two formats."""

import json
import pathlib

import numpy as np
import pytest

from prumerge_jax.digits import quantised


def test_first_difference() -> None:
    first = np.array([4, 5, 6])
    assert quantised.first_difference(first, first) is None
    assert quantised.first_difference(first, np.array([4, 9, 6])) == 1
    assert quantised.first_difference(first, first[:2]) == 2


@pytest.mark.slow
def test_the_miniature_in_int8_and_int4(tmp_path: pathlib.Path) -> None:
    output = tmp_path / "rows.json"
    name = "prumerge:neighbours=8"
    formats = ["--formats", "int8", "int4"]
    quantised.main(["--scenes=8", *formats, f"--reduction={name}", f"--output={output}"])
    rows = {(row["format"], row["reduction"]): row for row in json.loads(output.read_text())}
    assert len(rows) == 3
    plain, eight, four = (rows[form, name] for form in ("float32", "int8", "int4"))
    assert plain["kl_mean"] == 0
    assert plain["identical"] == 1
    assert 0 < eight["kl_mean"] < 1e-3 < four["kl_mean"]
    assert eight["identical"] >= four["identical"]
    low, high = (eight["difference"][end] for end in ("low", "high"))
    assert low <= eight["difference"]["difference"] <= high
