"""The benchmarks by name."""

from typing import Any

from prumerge_jax.evaluation.benchmark import Benchmark
from prumerge_jax.evaluation.digits import Digits
from prumerge_jax.evaluation.gqa import Gqa
from prumerge_jax.evaluation.llava_bench import LlavaBench
from prumerge_jax.evaluation.mm_vet import MmVet
from prumerge_jax.evaluation.mmbench import MMBENCH, MMBENCH_CN
from prumerge_jax.evaluation.mme import Mme
from prumerge_jax.evaluation.pope import Pope
from prumerge_jax.evaluation.scienceqa import ScienceQa
from prumerge_jax.evaluation.seed_bench import SeedBench
from prumerge_jax.evaluation.textvqa import TextVqa
from prumerge_jax.evaluation.vizwiz import VizWiz
from prumerge_jax.evaluation.vqav2 import VqaV2

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
