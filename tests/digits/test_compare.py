"""Reductions side by side: what is kept of the digits, and how rows are compared."""

import json

import numpy as np
import pytest

from prumerge_jax import reductions
from prumerge_jax.digits import compare
from prumerge_jax.digits.questions import FAMILIES
from prumerge_jax.digits.scenes import CANVAS, draw_scene


def test_ink_is_where_the_digits_are_and_bright() -> None:
    scene = draw_scene("validation", 5, seed=0)
    assert scene.ink.shape == (CANVAS, CANVAS)
    assert set(np.unique(scene.ink)) == set(range(len(scene.digits) + 1))
    assert scene.image[scene.ink > 0].mean() > scene.image[scene.ink == 0].mean() + 50


def test_recall_counts_every_digit_alike() -> None:
    ink = np.zeros((96, 96), np.uint8)
    ink[0:8, 0:16] = 1  # patches 0 and 1
    ink[80, 80:95] = 2  # patches 130 and 131
    assert compare.evidence_recall(ink, np.arange(144), 8) == 1
    assert compare.evidence_recall(ink, np.array([0, 130, 131]), 8) == pytest.approx(0.75)
    assert compare.evidence_recall(ink, np.array([5]), 8) == 0


def test_questions_stand_under_their_family() -> None:
    asked = compare.draw("validation", 6)
    number = len(asked.prompts)
    table = asked.by_family(np.arange(number, dtype=float))
    assert len(asked.images) == number == np.isfinite(table).sum()
    assert table.shape == (6, len(FAMILIES))
    for row, questions in enumerate(asked.questions):
        missing = {f for f, v in zip(FAMILIES, table[row], strict=True) if np.isnan(v)}
        assert missing == set(FAMILIES) - {q.family for q in questions}


def measured(accuracy: float, *, seed: int) -> compare.Measured:
    rng = np.random.default_rng(seed)
    right = (rng.random((200, 4)) < accuracy).astype(float)
    right[::7, 3] = np.nan
    return compare.Measured(right, 1 - right, np.full(200, 18.0), np.full(200, 0.5))


def test_towers_are_averaged_and_pairs_have_intervals() -> None:
    towers = [
        {"cover:tokens=18": measured(0.8, seed=s), "top:tokens=18": measured(0.6, seed=s + 9)}
        for s in range(3)
    ]
    mean = compare.averaged(towers)
    cover, top = mean.values()
    assert cover.mean == pytest.approx(np.mean([t["cover:tokens=18"].mean for t in towers]))
    pair = ("top:tokens=18", "cover:tokens=18")
    interval = compare.differences(mean, [pair])[pair]
    assert interval.low < interval.difference < interval.high < 0
    table = compare.table(mean, {"top:tokens=18": "cover:tokens=18"})
    first, second, third = table.splitlines()
    assert first.startswith("reduction")
    assert "[" not in second
    assert third.endswith(f"{interval.high:+.1f}]")
    record = compare.record(mean, [pair])
    assert record["reductions"]["top:tokens=18"]["accuracy_mean"] == pytest.approx(100 * top.mean)
    assert [each["low"] for each in record["differences"]] == [interval.low]


def test_every_reduction_is_asked_at_every_budget() -> None:
    budget_of = compare.at_budgets(compare.METHODS, [9, 54])
    pairs = compare.equal_budgets(budget_of)
    assert ("cover:tokens=9", "visionzip:dominant=7,contextual=1") in pairs
    assert {budget_of[first] == budget_of[second] for first, second in pairs} == {True}
    assert budget_of["prumerge:neighbours=8"] is None
    for name, budget in budget_of.items():
        if budget is not None:
            assert reductions.parse(name).capacity_for(144) == budget


@pytest.mark.slow
def test_a_run_on_the_miniature(tmp_path, capsys, monkeypatch) -> None:
    output = tmp_path / "compare.json"
    monkeypatch.setattr("sys.argv", ["compare", "--scenes=3", "--reduction=cover top fastv",
                                     "--tokens=144", "--positions=original",
                                     f"--output={output}"])  # fmt: skip
    compare.main()
    rows = json.loads(output.read_text())["original"]["reductions"]
    assert set(rows) == {"full", "cover:tokens=144", "top:tokens=144", "fastv"}
    same = {**rows["full"], "log_likelihood_gap": pytest.approx(0, abs=1e-3)}
    assert rows["cover:tokens=144"] == same
    assert rows["fastv"]["tokens"] == pytest.approx((2 * 144 + 72) / 3)
    assert "about" in capsys.readouterr().out
