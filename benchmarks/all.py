"""Every benchmark on whatever accelerator is there, most important first, within a given time.

    python benchmarks/all.py --minutes 10
    python benchmarks/all.py --minutes 3 --size tiny

`numerics` comes first, and nothing after it where the numbers differ from the CPU's. Every step is
a process of its own that may take up to three times its part of the time that is left, so that a
slow machine leaves out the last ones and does not cut all of them short. After each step `--json`
and `--markdown` are written anew: the first holds every step's report, the second the figures that
have a bar (`bars.py`) beside it, and every step's table. What needs a package that is not there is
left out, with the reason. Exit status: 0, or 1 where the numbers differ or a step failed.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from bars import BARS, Bar

_PROBE = """
import json, jax, jax.numpy as jnp
from measuring import environment, measured_peak
platform = jax.default_backend()
flops, bandwidth = measured_peak(jnp.dtype("float32" if platform == "cpu" else "bfloat16"))
print(json.dumps(environment() | {"platform": platform, "peak": f"{flops:.4g}:{bandwidth:.4g}"}))
"""
GENEROSITY = 3
"""How many times its part of the time that is left a step may take."""
FOLDER = pathlib.Path(__file__).resolve().parent
_ROWS = "--geometry=tiny --text_tokens=6 --row_length=32 --repeats=2"
_SCORING = (
    f"{_ROWS} --full_row_length=32 --requests=8 --full_requests=2 --window=4 --full_window=2 "
    "--batch_size=2 --means 2 --slots=2 --output_tokens=1"
)


@dataclasses.dataclass(frozen=True)
class Step:
    """One benchmark with its flags.

    Attributes:
      name: what the report calls it; its first word is the benchmark.
      always: flags at every size.
      accelerator: flags at full size; on a CPU the benchmark's defaults are meant for it.
      tiny: flags at tiny size.
      weight: of the time that is left, against the weights of the steps that follow.
      needs: packages that have to be there.
      has_floor: whether it compares with a floor, from the peak that `--chip` says.
    """

    name: str
    always: str = ""
    accelerator: str = ""
    tiny: str = ""
    weight: float = 1.0
    needs: tuple[str, ...] = ()
    has_floor: bool = True

    def command(self, size: str, platform: str, report: pathlib.Path) -> list[str]:
        """The command line."""
        script = FOLDER / f"{self.name.partition(',')[0]}.py"
        sized = self.tiny if size == "tiny" else self.accelerator if platform != "cpu" else ""
        flags = shlex.split(f"{self.always} {sized}")
        return [sys.executable, str(script), *flags, f"--json={report}"]

    def reason_to_skip(self) -> str:
        """Why the step is left out; empty if it is not."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"needs {' and '.join(absent)}" if absent else ""


NUMERICS = Step("numerics", tiny="--geometry=tiny --kept=3", weight=2, has_floor=False)
STEPS = (
    NUMERICS,
    Step(
        "vision_tower",
        accelerator="--batches 1 32 --repeats=10",
        tiny="--geometry=tiny --batches 2 --repeats=2",
    ),
    Step(
        "prumerge_step",
        "--no-loop",
        accelerator="--batch=32",
        tiny="--geometry=tiny --batch=2 --kept 3 --kept_plus 3 --repeats=2",
        weight=0.5,
    ),
    Step("prefill", accelerator="--repeats=10", tiny=f"{_ROWS} --visual 3"),
    Step(
        "decode",
        accelerator="--repeats=10",
        tiny="--geometry=tiny --slots 2 --text_tokens=5 --new_tokens=4 --steps=2 --repeats=2",
        weight=1.5,
    ),
    Step(
        "scoring",
        "--no-peer",
        accelerator="--means 40 144 --requests=1024 --full_requests=256 --repeats=2",
        tiny=_SCORING,
        weight=2,
    ),
    Step(
        "scoring, shared",
        "--no-peer --questions_per_image=18",
        accelerator="--requests=1152 --full_requests=288 --apart_requests=288 --repeats=2",
        tiny=_SCORING,
        weight=2,
    ),
    Step(
        "lora_training",
        accelerator="--repeats=5",
        tiny=f"{_ROWS} --visual 3 --rank=2",
        needs=("grain", "tensorflow_datasets"),  # training imports what reads its data
    ),
    Step(
        "quantised_decode",
        accelerator="--repeats=10",
        tiny="--geometry=tiny --text_tokens=5 --new_tokens=4 --steps=2 --repeats=2",
        has_floor=False,
    ),
    Step(
        "prumerge_step, peer",
        accelerator="--batch=32 --repeats=3",
        tiny="--geometry=tiny --batch=2 --kept 3 --kept_plus 3 --repeats=2",
        weight=0.5,
        needs=("torch",),
    ),
    Step(
        "scoring, peer",
        accelerator="--requests=1024 --full_requests=256 --repeats=2 --peer_batches 32",
        tiny=f"{_SCORING} --peer_batches 2",
        weight=2,
        needs=("torch", "transformers"),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the steps in order; returns the exit status."""
    arguments = parse(argv)
    end = time.monotonic() + 60 * arguments.minutes
    first = __doc__.splitlines()[0].rstrip(".")
    print(f"all: {first}; at most {arguments.minutes:g} min", flush=True)
    environment = probe()
    size = arguments.size
    if size is None:
        size = "tiny" if environment["platform"] == "cpu" and arguments.minutes < 30 else "full"
    print(f"{environment['devices']} x {environment['device']}, {size} sizes", flush=True)
    record: dict[str, Any] = {
        "benchmark": "all",
        "environment": environment,
        "arguments": {"minutes": arguments.minutes, "size": size},
        "results": [],
    }
    done: list[dict[str, Any]] = record["results"]
    for number, step in enumerate(STEPS):
        left = [other for other in STEPS[number:] if not other.reason_to_skip()]
        if reason := step.reason_to_skip() or stopped(done):
            done.append(outcome(step, "skipped", reason=reason))
        else:
            share = step.weight / sum(other.weight for other in left)
            limit = max(end - time.monotonic(), 0) * min(GENEROSITY * share, 1)
            done.append(run(step, size, limit, environment))
        print(f"== {describe(done[-1])}", flush=True)
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")
        arguments.markdown.write_text(markdown(record))
    print(f"{arguments.json} and {arguments.markdown} hold all figures")
    return int(any(each["status"] in ("failed", "differs") for each in done))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="for all steps together")
    parser.add_argument(
        "--size",
        choices=("full", "tiny"),
        help="tiny shows that everything runs (default: tiny on a CPU in less than 30 minutes)",
    )
    parser.add_argument("--json", type=pathlib.Path, default=pathlib.Path("all.json"))
    parser.add_argument("--markdown", type=pathlib.Path, default=pathlib.Path("all.md"))
    arguments = parser.parse_args(argv)
    if not arguments.minutes > 0:
        parser.error(f"--minutes {arguments.minutes}: expected a number above 0")
    return arguments


def probe() -> dict[str, Any]:
    """The environment as the benchmarks report it, the platform, and its measured peak.

    Asked in another process: one that has touched an accelerator keeps it from the steps.
    """
    command = [sys.executable, "-c", _PROBE]
    done = subprocess.run(
        command, cwd=FOLDER, env=child_environment(), stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit("all.py: JAX finds no device; the lines above say why")
    return json.loads(done.stdout.splitlines()[-1])


def child_environment() -> dict[str, str]:
    """Of the steps: the package is this checkout's, and an error's last line is the error."""
    paths = [str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JAX_TRACEBACK_FILTERING": "off",
    }


def stopped(done: Sequence[Mapping[str, Any]]) -> str:
    """Why nothing more may be measured; empty if it may."""
    differs = any(each["status"] == "differs" for each in done)
    return "the numbers differ from the CPU's: mend that first" if differs else ""


def run(step: Step, size: str, limit: float, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a step for at most `limit` seconds; the machine's peak was measured by `probe`."""
    print(f"== {step.name}, at most {limit:.0f} s", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report, errors = pathlib.Path(folder, "report.json"), pathlib.Path(folder, "errors")
        command = step.command(size, environment["platform"], report)
        if step.has_floor:
            command.append(f"--chip={environment['peak']}")
        with errors.open("w") as file:
            process = subprocess.Popen(
                command, cwd=FOLDER, env=child_environment(), stderr=file, start_new_session=True
            )
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                kill(process)
        seconds = time.monotonic() - start
        record = json.loads(report.read_text()) if status is not None and report.exists() else None
        lines = errors.read_text(errors="replace").strip().splitlines()
    if status is None:
        reason = f"not at its end after {limit:.0f} s"
        return outcome(step, "out of time", seconds, reason)
    if status and step is NUMERICS and record is not None:
        return outcome(step, "differs", seconds, "a check says NO", record)
    if status:
        reason = lines[-1][:300] if lines else f"exit status {status}"
        return outcome(step, "failed", seconds, reason)
    return outcome(step, "measured", seconds, "", record)


def kill(process: subprocess.Popen) -> None:
    """Ends a process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def outcome(
    step: Step,
    status: str,
    seconds: float = 0.0,
    reason: str = "",
    record: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A row of the report; `record` is the step's own report."""
    return {
        "step": step.name,
        "status": status,
        "seconds": seconds,
        "reason": reason,
        "record": record,
    }


def describe(result: Mapping[str, Any]) -> str:
    """One line about a step."""
    reason = f": {result['reason']}" if result["reason"] else ""
    return f"{result['step']}: {result['status']} in {result['seconds']:.0f} s{reason}"


def markdown(record: Mapping[str, Any]) -> str:
    """Figures with bars, then every step's rows."""
    environment, arguments = record["environment"], record["arguments"]
    flags = f"--minutes {arguments['minutes']:g} --size {arguments['size']}"
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines = [
        f"# {environment['devices']} x {environment['device']}",
        "",
        f"`python benchmarks/all.py {flags}`.",
        f"Python {environment['python']}, {versions}.",
        "",
        "| figure | measured | bar | stretch | reached |",
        "|---|---|---|---|---|",
        *(bar_line(bar, record["results"], environment) for bar in BARS),
    ]
    for result in record["results"]:
        lines += ["", f"## {result['step']}", "", f"{describe(result)}.", *table(result["record"])]
    return "\n".join(lines) + "\n"


def bar_line(bar: Bar, results: Sequence[Mapping[str, Any]], environment: Mapping[str, Any]) -> str:
    """A figure beside its bar."""
    (record,) = [r["record"] for r in results if r["step"] == bar.step] or [None]
    value = None if record is None else bar.value(record["results"])
    geometry = None if record is None else record["arguments"].get("geometry")
    device = f"{environment['platform']} {environment['device']}"
    goals = [bar.bar] if bar.stretch is None else [bar.bar, bar.stretch]
    if value is None:
        reached = "not measured"
    elif not bar.applies(geometry, device):
        reached = f"no bar for {geometry} here"
    else:
        number = sum(bar.reached(value, goal) for goal in goals)
        reached = ("no", "bar", "stretch")[number]
    sign = "≥" if bar.at_least else "≤"
    cells = [bar.figure, cell(value), f"{sign} {bar.bar:g}"]
    cells += ["–" if bar.stretch is None else f"{sign} {bar.stretch:g}", reached]
    return f"| {' | '.join(cells)} |"


def table(record: Mapping[str, Any] | None) -> list[str]:
    """The rows of a step's report."""
    if record is None:
        return []
    rows = record["results"]
    lines = ["", f"| {' | '.join(rows[0])} |", "|---" * len(rows[0]) + "|"]
    lines += [f"| {' | '.join(map(cell, row.values()))} |" for row in rows]
    return lines + [line for note in record["notes"] for line in ("", f"{note}.")]


def cell(value: Any) -> str:
    """A value as the table shows it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return "–" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
