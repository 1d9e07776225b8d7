"""The benchmarks by name."""

from typing import Any

from prumerge_jax.evaluation.benchmarks.base import Benchmark
from prumerge_jax.evaluation.benchmarks.gqa import Gqa
from prumerge_jax.evaluation.benchmarks.llava_bench import LlavaBench
from prumerge_jax.evaluation.benchmarks.mm_vet import MmVet
from prumerge_jax.evaluation.benchmarks.mmbench import MMBENCH, MMBENCH_CN
from prumerge_jax.evaluation.benchmarks.mme import Mme
from prumerge_jax.evaluation.benchmarks.nextqa import NextQa
from prumerge_jax.evaluation.benchmarks.own_questions import OwnQuestions
from prumerge_jax.evaluation.benchmarks.pope import Pope
from prumerge_jax.evaluation.benchmarks.scienceqa import ScienceQa
from prumerge_jax.evaluation.benchmarks.seed_bench import SeedBench
from prumerge_jax.evaluation.benchmarks.textvqa import TextVqa
from prumerge_jax.evaluation.benchmarks.video_qa import ACTIVITYNET_QA, MSRVTT_QA, MSVD_QA
from prumerge_jax.evaluation.benchmarks.vizwiz import VizWiz
from prumerge_jax.evaluation.benchmarks.vqav2 import VqaV2
from prumerge_jax.options import unknown

BENCHMARKS: dict[str, Benchmark[Any]] = {}
"""Every benchmark that was registered."""


def register(benchmark: Benchmark[Any]) -> None:
    """Makes a benchmark known by its name.

    Raises:
      ValueError: another one has that name.
    """
    if benchmark.name in BENCHMARKS:
        raise ValueError(f"there is a benchmark {benchmark.name!r} already")
    BENCHMARKS[benchmark.name] = benchmark


def benchmark(name: str) -> Benchmark[Any]:
    """The benchmark of that name.

    Raises:
      ValueError: There is none; the message lists those that exist.
    """
    if name not in BENCHMARKS:
        raise ValueError(unknown("unknown benchmark", name, BENCHMARKS))
    return BENCHMARKS[name]


def unnamed_benchmark(*, has_questions: bool) -> Benchmark[Any]:
    """The benchmark of a configuration that names none.

    A question file alone makes answers without a score; without one, the benchmark that makes its
    questions itself is meant.

    Raises:
      ValueError: no registered benchmark makes its questions itself.
    """
    if has_questions:
        return benchmark(OwnQuestions.name)
    for entry in BENCHMARKS.values():
        if entry.default_options is not None:
            return entry
    raise ValueError(
        "nothing to answer: pass --config.questions=FILE, and --config.benchmark=NAME to score it"
    )


for _benchmark in (
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
    MSVD_QA,
    MSRVTT_QA,
    ACTIVITYNET_QA,
    NextQa(),
    OwnQuestions(),
):
    register(_benchmark)
