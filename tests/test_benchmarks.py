"""Every benchmark runs at its smallest size and reports what it documents."""

import importlib
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from prumerge_jax.engine.shapes import EngineShapes
from prumerge_jax.models.tuning import Tuning

pytestmark = pytest.mark.slow

BENCHMARKS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"
ROWS = "--geometry=tiny --text_tokens=6 --row_length=32 --repeats=2"
COMMANDS = {
    "prumerge_step": "--geometry=tiny --batch=2 --kept 3 --kept_plus 3 --repeats=2",
    "compile": "--layers=2 --width=16 --repeats=1",
    "reductions": "--geometry=tiny --reductions=prumerge --batch=2 --repeats=2",
    "preprocess": "--width=64 --height=48 --images=8 --most_workers=2 --repeats=1",
    "packing": "--shards=4 --samples_per_shard=4 --steps=1 --crops 1 3",
    "vision_tower": "--geometry=tiny --batches 2 --repeats=2",
    "prefill": f"{ROWS} --visual 3",
    "decode": "--geometry=tiny --slots 2 --text_tokens=5 --new_tokens=4 --steps=2 --repeats=2",
    "quantised_decode": "--geometry=tiny --text_tokens=5 --new_tokens=4 --steps=2 --repeats=2",
    "quantised_quality": "--geometry=tiny --formats=int4 --reduction=prumerge --texts=2 "
    "--positions=8",
    "lora_training": f"{ROWS} --visual 3 --rank=2",
    "numerics": "--geometry=tiny --kept=3 --dtype=bfloat16",
    "scoring": f"{ROWS} --full_row_length=32 --requests=8 --full_requests=2 --window=4 --data=2 "
    "--full_window=2 --batch_size=2 --means 2 --slots=2 --peer_batches 2 --output_tokens=3",
}
README = (BENCHMARKS / "README.md").read_text()
KEYS = {
    "prumerge_step": {"ms", "loop_ms", "ratio", "floor_share", "tower_share", "visual_tokens"},
    "compile": {"trace_s", "compile_s", "total_s", "layers"},
    "reductions": {"ms", "over_tower", "flops_over_tower"},
    "preprocess": {"ms", "images_per_s", "over_one_worker"},
    "packing": {"over_needed", "crops_over_mean"},
    "vision_tower": {"ms", "images_per_s", "over_tower", "floor_share", "utilisation"},
    "prefill": {"ms", "segments_per_s", "efficiency", "floor_share", "utilisation"},
    "decode": {"reduction", "slots", "ms", "tokens_per_s", "over_full", "bound", "floor_share",
               "kv_allocated_over_valid", "kv_read_over_valid", "kv_mb_per_sequence"},
    "quantised_decode": {"format", "slots", "ms", "tokens_per_s", "speedup", "decoder_mb"},
    "quantised_quality": {"format", "reduction", "kl_mean", "kl_p99", "same", "blocks_mb"},
    "lora_training": {"ms", "samples_per_s", "speedup", "utilisation_4n", "utilisation"},
    "numerics": {"check", "figure", "limit", "passed"},
    "scoring": {"questions_per_s", "visual_mean", "efficiency", "speedup", "flop_ratio_share",
                "floor_share", "memory_gb"},
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_reports_finite_figures(
    name: str,
    request: pytest.FixtureRequest,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if name in ("prumerge_step", "scoring"):
        pytest.importorskip("torch")
    monkeypatch.syspath_prepend(BENCHMARKS)
    if name == "compile":  # it refuses to time what a cache already holds
        request.getfixturevalue("no_compilation_cache")
    if name != "decode":  # measuring the machine's peak once is enough
        measuring = importlib.import_module("measuring")
        monkeypatch.setattr(measuring, "measured_peak", lambda dtype: (1e11, 1e10))
    path = tmp_path / "report.json"
    importlib.import_module(name).main([*COMMANDS[name].split(), f"--json={path}"])
    report = json.loads(path.read_text())
    assert report["benchmark"] == name
    assert report["environment"]["versions"]["jax"]
    for result in report["results"]:
        assert result.keys() >= KEYS[name]
        for key, value in result.items():
            assert isinstance(value, str) or math.isfinite(value), key
    table = capsys.readouterr().out
    assert all(key in table for key in KEYS[name])
    assert_begins(name, table)
    assert_is_documented(name, report["results"])


def assert_begins(name: str, printed: str) -> None:
    """The first line says what is done and how long it takes."""
    first = printed.splitlines()[0]
    assert re.fullmatch(rf"{name}: .{{20,}}; about [\d.]+ min on two cores by default", first)


def assert_is_documented(name: str, results: list[dict[str, object]]) -> None:
    """The keys of every row are those of the README, in their order."""
    (line,) = re.findall(rf"^\| `{name}` \| (.*) \|$", README, re.M)
    assert all(list(row) == re.findall(r"`(\w+)`", line) for row in results)


def test_a_conversion_is_measured_step_by_step(tmp_path: pathlib.Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "convert.py", "--model=tiny", "--layers=0", "--export"]
    done = subprocess.run(
        [*command, f"--json={report}"], cwd=BENCHMARKS, capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": str(BENCHMARKS.parent)},
    )  # fmt: skip
    assert_begins("convert", done.stdout)
    steps = json.loads(report.read_text())["results"]
    names = ["Checkpoint -> our directory", "Our directory -> 8 devices"]
    assert [step["step"] for step in steps] == [*names, "Our directory -> checkpoint"]
    assert all(0 < step["imports_gb"] <= step["peak_gb"] < 2 for step in steps)
    assert_is_documented("convert", steps)


def test_without_pytorch_our_step_is_timed_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.delitem(sys.modules, "prumerge_step", raising=False)
    monkeypatch.setitem(sys.modules, "torch", None)
    prumerge_step = importlib.import_module("prumerge_step")
    monkeypatch.delitem(sys.modules, "prumerge_step")
    report = tmp_path / "report.json"
    prumerge_step.main([*COMMANDS["prumerge_step"].split(), f"--json={report}"])
    for row in json.loads(report.read_text())["results"]:
        assert row["ms"] > 0
        assert row["loop_ms"] is row["ratio"] is None


def test_the_loop_and_our_step_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong token stops the benchmark before anything is timed."""
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(BENCHMARKS)
    prumerge_step = importlib.import_module("prumerge_step")

    right = prumerge_step.torch_prumerge.reduce_tokens
    monkeypatch.setattr(
        prumerge_step.torch_prumerge,
        "reduce_tokens",
        lambda *inputs, **flags: [tokens + 0.01 for tokens in right(*inputs, **flags)],
    )
    with pytest.raises(ValueError, match="tokens differ by"):
        prumerge_step.main(COMMANDS["prumerge_step"].split())


def test_other_numbers_than_the_cpus_are_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logits a tenth too large on the side that is checked."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    numerics = importlib.import_module("numerics")
    right = numerics.logits

    def wrong(*arguments: object) -> np.ndarray:
        return (1.0 if arguments[-1] == Tuning.plain() else 1.1) * right(*arguments)

    monkeypatch.setattr(numerics, "logits", wrong)
    monkeypatch.setattr(numerics, "company", lambda *_: [])
    with pytest.raises(SystemExit) as stopped:
        numerics.main(["--geometry=tiny", "--kept=3"])
    assert stopped.value.code == 1
    passed = re.findall(r"^ *(\w+) .* (yes|NO) ", capsys.readouterr().out, re.M)
    right_ones = {"selection": "yes", "merged": "yes", "attention": "yes"}
    assert dict(passed) == {**right_ones, "logits": "NO"}


def test_drawn_counts_reach_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine of the scoring benchmark computes exactly as many tokens as were drawn."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    scoring, models, drawn = map(importlib.import_module, ("scoring", "models", "drawn"))
    config = models.geometry("tiny")
    counts = drawn.drawn_counts(6, mean=3, most=5, seed=0)[:, None]
    requests = drawn.random_requests(config, number=6, text_tokens=4, output_tokens=1)
    dtype = np.dtype(np.float32)
    placed = scoring.PlacedModel(*models.random_llava(config, dtype), config, dtype)
    shapes = EngineShapes(
        batch_size=2,
        window_size=4,
        row_length=32,
        longest_prompt=32,
        cache_length=32,
        prefill_rows=1,
    )
    engine = scoring.Engine(placed, scoring.reductions.parse("prumerge"), shapes)
    engine.encoder = drawn.DrawnCounts(placed, shapes)
    engine.encoder.counts = counts
    visual = {answer.key: answer.usage.visual_tokens for answer in engine.score(requests)}
    assert [visual[key] for key in range(6)] == counts[:, 0].tolist()
    assert engine.counters.real_tokens == counts.sum() + 6 * (4 + 1)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["--crops=5", "--frames=3"])
def test_scoring_counts_the_tokens_of_all_crops(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    arguments = (
        f"{what} --geometry=tiny --text_tokens=8 --means 2 --requests=4 --full_requests=2 "
        "--repeats=1 --batch_size=8 --data=1"
    )
    path = tmp_path / "report.json"
    importlib.import_module("scoring").main([*arguments.split(), f"--json={path}"])
    full, pruned = json.loads(path.read_text())["results"]
    crops = int(what[-1])
    patches = importlib.import_module("models").geometry("tiny").vision.num_patches
    assert full["visual_mean"] == crops * full["visual_per_crop"] == crops * patches
    assert pruned["visual_mean"] == pytest.approx(crops * pruned["visual_per_crop"])
    assert pruned["flop_ratio"] > 1


def test_scoring_compares_questions_that_share_with_questions_apart(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    arguments = (
        "--geometry=tiny --questions_per_image=4 --text_tokens=40 --means 20 --requests=8 "
        "--full_requests=4 --apart_requests=2 --row_length=64 --full_row_length=128 --repeats=1"
    )
    path = tmp_path / "report.json"
    importlib.import_module("scoring").main([*arguments.split(), f"--json={path}"])
    results = json.loads(path.read_text())["results"]
    arms = [(row["arm"], row["shared"]) for row in results]
    assert arms == [(name, shared) for name in ("full", "prumerge+") for shared in (True, False)]
    assert all(row["questions_per_s"] > 0 for row in results)
    assert all(row["sharing_speedup"] == 1 for row in results if not row["shared"])


def test_counts_have_the_mean_and_spread_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    scoring = importlib.import_module("scoring")
    counts = scoring.drawn_counts(20_000, mean=40, most=145, seed=0)
    assert counts.mean() == pytest.approx(40, rel=0.02)
    assert np.log(counts).std() == pytest.approx(0.45, abs=0.02)
    assert counts.min() >= 1
    assert counts.max() <= 145
