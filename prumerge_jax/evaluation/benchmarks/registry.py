"""The benchmarks by name."""

from typing import Any

from prumerge_jax.digits.benchmark import Digits
from prumerge_jax.evaluation.benchmarks.base import Benchmark
from prumerge_jax.evaluation.benchmarks.gqa import Gqa
from prumerge_jax.evaluation.benchmarks.llava_bench import LlavaBench
from prumerge_jax.evaluation.benchmarks.mm_vet import MmVet
from prumerge_jax.evaluation.benchmarks.mmbench import MMBENCH, MMBENCH_CN
from prumerge_jax.evaluation.benchmarks.mme import Mme
from prumerge_jax.evaluation.benchmarks.pope import Pope
from prumerge_jax.evaluation.benchmarks.scienceqa import ScienceQa
from prumerge_jax.evaluation.benchmarks.seed_bench import SeedBench
from prumerge_jax.evaluation.benchmarks.textvqa import TextVqa
from prumerge_jax.evaluation.benchmarks.vizwiz import VizWiz
from prumerge_jax.evaluation.benchmarks.vqav2 import VqaV2

BENCHMARKS: dict[str, Benchmark[Any]] = {
    entry.name: entry
    for entry in (
        VqaV2(),
        Gqa(),
        VizWiz(),
        ScienceQa(),
        TextVqa(),
        Pope(),
        Mme(),
        MMBENCH,
        MMBENCH_CN,
        SeedBench(),
        LlavaBench(),
        MmVet(),
        Digits(),
    )
}


def benchmark(name: str) -> Benchmark[Any]:
    """The benchmark of that name.

    Raises:
      ValueError: There is none; the message lists those there are.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; known: {', '.join(sorted(BENCHMARKS))}")
    return BENCHMARKS[name]
