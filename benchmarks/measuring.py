"""What all benchmarks share: their first line, timing, peak rates, memory, and the report.

`--json FILE` writes one object: `benchmark`; `environment` (device, number of devices, cores, load,
versions, XLA flags); `arguments`; `results`, a list of flat rows with the same keys, listed in
`benchmarks/README.md`; `notes`; and `peak`, where floors are computed from one.
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from prumerge_jax.cost import CHIPS, Chip

Name = TypeVar("Name", str, int)

_SILENCE_SECONDS = 3.0
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers")


def begin(name: str, what: str, minutes: float) -> None:
    """Prints the first line of a benchmark.

    Args:
      name: its name.
      what: what it does; the first line is taken.
      minutes: about how long it takes at its default sizes on two CPU cores.
    """
    first = what.splitlines()[0].rstrip(".")
    print(f"{name}: {first}; about {minutes:g} min on two cores by default", flush=True)


def progress(text: str) -> None:
    """Prints what was done or comes next, so that nobody waits in the dark."""
    print(f"  {text}", flush=True)


def interleaved(arms: Mapping[Name, Callable[[], Any]], repeats: int) -> dict[Name, list[float]]:
    """Seconds of every run of every arm.

    The arms take turns (A B A B), so that a change of the machine's load hits all of them. Each
    runs once before, untimed: compilation and first touches are not counted.
    """
    for name, arm in arms.items():
        start = time.perf_counter()
        jax.block_until_ready(arm())
        if (took := time.perf_counter() - start) > _SILENCE_SECONDS:
            progress(f"{name}: compiled and run once, {took:.0f} s")
    seconds: dict[Name, list[float]] = {name: [] for name in arms}
    for number in range(repeats):
        left = sum(map(sum, seconds.values())) * (repeats - 1)
        if number == 1 and left > _SILENCE_SECONDS:
            progress(f"{repeats - 1} more rounds, {left:.0f} s")
        for name, arm in arms.items():
            start = time.perf_counter()
            jax.block_until_ready(arm())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def quartiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 95th percentile in milliseconds, as columns of a report."""
    median, p95 = 1e3 * np.quantile(seconds, [0.5, 0.95])
    return {"ms": float(median), "ms_p95": float(p95)}


class Compilations:
    """Counts the functions that XLA compiles after its creation."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event.endswith("backend_compile_duration")


def peak_rates(name: str | None, dtype: jnp.dtype) -> Chip:
    """The rates that floors are computed from.

    The cost model counts two bytes per number. For another width the bandwidth is scaled instead,
    so that `Chip.bandwidth` always says how fast 16-bit numbers would be.

    Args:
      name: a chip of the cost model's table, at its datasheet peaks; FLOP/s and byte/s with a colon
        between them; None measures this machine, by the best of a few large matrix products and
        sums of a large array.
      dtype: compute dtype.

    Raises:
      ValueError: a named chip and a dtype that its datasheet peak is not for.
    """
    if name is None:
        progress("measuring this machine's peak")
        flops, bandwidth = measured_peak(dtype)
    elif ":" in name:
        flops, bandwidth = map(float, name.split(":"))
    elif dtype.itemsize != 2:
        raise ValueError(
            f"the datasheet peaks of {name} are for 16 bit, the computation is {dtype}: choose "
            "--dtype bfloat16, or leave --chip out to measure this machine's peak"
        )
    else:
        return CHIPS[name]
    return Chip(flops, 2 * bandwidth / dtype.itemsize)


def measured_peak(dtype: jnp.dtype) -> tuple[float, float]:
    """FLOP/s and byte/s of this machine."""
    on_cpu = jax.default_backend() == "cpu"
    side, numbers = (2048, 1 << 26) if on_cpu else (8192, 1 << 29)
    matrix = jnp.ones((side, side), dtype)
    array = jnp.ones((numbers,), dtype)
    multiply, add_up = jax.jit(jnp.matmul), jax.jit(jnp.sum)
    seconds = interleaved(
        {"multiply": lambda: multiply(matrix, matrix), "read": lambda: add_up(array)}, repeats=7
    )
    bandwidth = dtype.itemsize * numbers / min(seconds["read"])
    return 2 * side**3 / min(seconds["multiply"]), bandwidth


def _chip(name: str) -> str:
    """A chip's name or its rates, checked."""
    rates = name.split(":")
    if name in CHIPS or (len(rates) == 2 and all(float(rate) > 0 for rate in rates)):
        return name
    raise ValueError


def reset_peak_memory() -> None:
    """Starts a new peak of the process's resident memory, where the kernel allows it (Linux)."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_memory_gb() -> float:
    """Peak memory since the last reset: of the accelerator, or resident in the process on CPU."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return float((device.memory_stats() or {}).get("peak_bytes_in_use", 0)) / 1e9
    return peak_resident_gb()


def peak_resident_gb() -> float:
    """Peak resident memory of this process.

    On Linux not from `getrusage`: what that reports is at least the size of the process that
    started this one.
    """
    try:
        status = pathlib.Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    (peak,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(peak) / 1e6


def environment() -> dict[str, Any]:
    """Hardware, versions and the load average of one minute."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else _cpu_model(),
        "devices": jax.device_count(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES if _version(name)},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _cpu_model() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that every benchmark has."""
    parser.add_argument("--json", type=pathlib.Path, help="also write the report to this file")


def add_rate_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of benchmarks that compare with a floor."""
    on_cpu = jax.default_backend() == "cpu"
    parser.add_argument(
        "--dtype",
        default="float32" if on_cpu else "bfloat16",
        choices=("float32", "bfloat16"),
        help="of weights and computation (default here: %(default)s)",
    )
    parser.add_argument(
        "--chip",
        type=_chip,
        metavar="CHIP",
        help=f"datasheet peaks of {', '.join(sorted(CHIPS))}, or FLOP/s:byte/s; default: this "
        "machine's, measured",
    )
    add_arguments(parser)


def report(
    name: str,
    arguments: argparse.Namespace,
    results: Sequence[Mapping[str, Any]],
    *,
    chip: Chip | None = None,
    notes: Sequence[str] = (),
) -> None:
    """Prints the results as a table and writes them as JSON where that was asked for.

    Args:
      name: name of the benchmark.
      arguments: its flags.
      results: one flat object per line of the table, all with the same keys; None was not
        measured.
      chip: the rates that floors come from.
      notes: printed below the table.
    """
    record = measured(name, arguments, results, notes)
    if chip is not None:
        scale = jnp.dtype(arguments.dtype).itemsize / 2  # see `peak_rates`
        record["peak"] = {
            "source": arguments.chip or "measured",
            "flops_per_second": chip.flops,
            "bytes_per_second": chip.bandwidth * scale,
        }
    for line in _lines(record):
        print(line)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


def measured(
    name: str,
    arguments: argparse.Namespace,
    results: Sequence[Mapping[str, Any]],
    notes: Sequence[str],
) -> dict[str, Any]:
    """What `--json` writes of a benchmark."""
    return {
        "benchmark": name,
        "environment": environment(),
        "arguments": {k: v for k, v in vars(arguments).items() if k != "json"},
        "results": list(results),
        "notes": list(notes),
    }


def _lines(record: Mapping[str, Any]) -> list[str]:
    machine = record["environment"]
    versions = " ".join(f"{k} {v}" for k, v in machine["versions"].items())
    lines = [
        f"{record['benchmark']}: {machine['devices']} x {machine['device']}, {machine['cores']} "
        f"cores, load {machine['load_average']:.1f}; python {machine['python']} {versions}"
    ]
    if "peak" in record:
        peak = record["peak"]
        lines.append(
            f"peak ({peak['source']}): {peak['flops_per_second'] / 1e12:.3f} TFLOP/s, "
            f"{peak['bytes_per_second'] / 1e9:.1f} GB/s"
        )
    header = list(record["results"][0])
    cells = [header, *([_cell(row[key]) for key in header] for row in record["results"])]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        lines.append("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)))
    return lines + list(record["notes"])


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
