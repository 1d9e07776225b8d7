"""`benchmarks/all.py`: the order, the limits, what it writes, and the bars."""

import importlib
import json
import pathlib
import re
import sys
import types

import pytest

BENCHMARKS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"
# A benchmark in a process of its own; the last argument is its --json.
FAKE = """
import json, pathlib, sys, time
exec(sys.argv[1])
record = {"arguments": {}, "results": [{"a": 1.0}], "notes": ["so be it"]}
pathlib.Path(sys.argv[2].removeprefix("--json=")).write_text(json.dumps(record))
sys.exit(end if "end" in globals() else 0)
"""


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("all")


def fake(everything: types.ModuleType, name: str, code: str = "", **fields: object) -> object:
    class Fake(everything.Step):
        def command(self, size: str, platform: str, report: pathlib.Path) -> list[str]:
            return [sys.executable, "-c", FAKE, code, f"--json={report}"]

    return Fake(name, **fields)


def run(
    everything: types.ModuleType, monkeypatch: pytest.MonkeyPatch, folder: pathlib.Path, steps: list
) -> tuple[int, dict[str, dict[str, object]], str]:
    """Exit status, results by step, and the Markdown."""
    environment = {"platform": "cpu", "device": "cpu", "devices": 1, "python": "3", "versions": {}}
    environment["peak"] = "1e12:1e11"
    monkeypatch.setattr(everything, "probe", lambda: environment)
    monkeypatch.setattr(everything, "STEPS", tuple(steps))
    monkeypatch.setattr(everything, "NUMERICS", steps[0])
    files = folder / "all.json", folder / "all.md"
    status = everything.main(["--minutes=0.5", f"--json={files[0]}", f"--markdown={files[1]}"])
    results = {r["step"]: r for r in json.loads(files[0].read_text())["results"]}
    return status, results, files[1].read_text()


@pytest.mark.slow
def test_every_step_is_bounded_and_leaves_the_others_alone(
    everything, monkeypatch, tmp_path: pathlib.Path
) -> None:
    steps = [
        fake(everything, "numerics"),
        fake(everything, "hangs", "time.sleep(600)", weight=0.1),
        fake(everything, "breaks", "1 / 0"),
        fake(everything, "lacks", needs=("no_such_package", "json")),
        fake(everything, "last"),
    ]
    status, results, page = run(everything, monkeypatch, tmp_path, steps)
    assert status == 1
    assert {name: result["status"] for name, result in results.items()} == {
        "numerics": "measured", "hangs": "out of time", "breaks": "failed", "lacks": "skipped",
        "last": "measured",
    }  # fmt: skip
    assert 0 < results["hangs"]["seconds"] < 10
    assert results["breaks"]["reason"] == "ZeroDivisionError: division by zero"
    assert results["lacks"]["reason"] == "needs no_such_package"
    assert "lacks: skipped in 0 s: needs no_such_package." in page
    assert "| a |\n|---|\n| 1 |\n\nso be it." in page


@pytest.mark.slow
def test_nothing_is_measured_where_the_numbers_differ(
    everything, monkeypatch, tmp_path: pathlib.Path
) -> None:
    steps = [fake(everything, "numerics", "end = 1"), fake(everything, "tower")]
    status, results, _ = run(everything, monkeypatch, tmp_path, steps)
    assert status == 1
    assert results["numerics"]["status"] == "differs"
    assert results["tower"]["status"] == "skipped"
    assert "mend that first" in results["tower"]["reason"]


def test_the_order_and_the_flags(everything: types.ModuleType) -> None:
    names = [step.name for step in everything.STEPS]
    assert names == [
        "numerics", "vision_tower", "prumerge_step", "prefill", "decode", "scoring",
        "scoring, shared", "lora_training", "quantised_decode", "prumerge_step, peer",
        "scoring, peer",
    ]  # fmt: skip
    for step in everything.STEPS:
        script = BENCHMARKS / f"{step.name.partition(',')[0]}.py"
        assert script.is_file()
        known = script.read_text() + (BENCHMARKS / "measuring.py").read_text()
        known += (BENCHMARKS / "models.py").read_text()
        for flag in re.findall(r"--(?:no-)?(\w+)", f"{step.always} {step.accelerator} {step.tiny}"):
            assert f'"--{flag}"' in known, (step.name, flag)


def test_a_bar_counts_where_it_is_for(everything: types.ModuleType) -> None:
    bars = importlib.import_module("bars")
    bar = bars.Bar("x", "decode", {"slots": 8}, ("new", "old"), 2.0, 3.0, geometry="7b", device="h")
    low = bars.Bar("y", "decode", {}, "old", 2.0, at_least=False)
    rows = [{"slots": 2, "old": 9.0}, {"slots": 8, "old": 2.5, "new": None}]
    assert bar.value(rows) == 2.5
    assert bar.value([{"slots": 8, "new": 1.0, "old": 2.0}]) == 1.0
    assert bar.value([]) is None
    environment = {"platform": "gpu", "device": "NVIDIA H200"}
    record = {"arguments": {"geometry": "7b"}, "results": rows}
    results = [{"step": "decode", "record": record}]
    assert everything.bar_line(bar, results, environment) == "| x | 2.5 | ≥ 2 | ≥ 3 | bar |"
    assert everything.bar_line(low, results, environment) == "| y | 9 | ≤ 2 | – | no |"
    record["arguments"]["geometry"] = "tiny"
    assert "no bar for tiny here" in everything.bar_line(bar, results, environment)
    assert "no bar for tiny here" in everything.bar_line(low, results, environment)
    assert "not measured" in everything.bar_line(bar, [], environment)
    results[0]["record"] = None
    assert "not measured" in everything.bar_line(bar, results, environment)


def test_every_bar_is_about_a_step(everything: types.ModuleType) -> None:
    names = {step.name for step in everything.STEPS}
    assert {bar.step for bar in everything.BARS} <= names


@pytest.mark.slow
def test_real_steps_run_at_tiny_size(
    everything: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What they all do with these flags is in `test_benchmarks`; here two are processes."""
    monkeypatch.setattr(everything, "STEPS", everything.STEPS[:2])
    files = tmp_path / "all.json", tmp_path / "all.md"
    flags = ["--minutes=3", "--size=tiny", f"--json={files[0]}", f"--markdown={files[1]}"]
    assert everything.main(flags) == 0
    first, *_ = capfd.readouterr().out.splitlines()
    assert re.fullmatch(r"all: .*; at most 3 min", first)
    record = json.loads(files[0].read_text())
    assert record["environment"]["versions"]["jax"]
    assert [result["step"] for result in record["results"]] == ["numerics", "vision_tower"]
    for result in record["results"]:
        assert set(result) == {"step", "status", "seconds", "reason", "record"}
        assert result["status"] == "measured", result
        report = result["record"]
        assert report["benchmark"] == result["step"]
        assert report["results"]
        assert all(row.keys() == report["results"][0].keys() for row in report["results"])
    page = files[1].read_text()
    assert page.count("\n## ") == len(record["results"])
