"""LoRA training planned on TPU slices: compiled ahead of time, not run.

    python benchmarks/tpu_plan.py
    python benchmarks/tpu_plan.py --models 7b 13b --slices all

One line per model and slice, by default 7B on the slice of its recipe: the recipe with PruMerge+ at
144 of 576 visual tokens per image, or crop, against all, at the same global batch of
`--samples_per_chip` per chip. Both run the same programs: rows are packed, so fewer tokens are
fewer micro-batches. Needs libtpu (`pip install 'prumerge_jax[tpu]'`), and no TPU; a slice takes
some minutes to compile for. The rows of `--json` are those of the tables, and `plans` beside them
holds the programs.
"""

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
from collections.abc import Sequence
from typing import Any

import jax
from measuring import add_arguments, begin, measured

from prumerge_jax.aot.compile import DoesNotFit, tpu
from prumerge_jax.aot.topology import topology
from prumerge_jax.aot.training import (
    ASSUMED_TEXT_TOKENS,
    Samples,
    TrainingPlan,
    assumed_samples,
    plan_training,
)
from prumerge_jax.cli import recipes
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.training.config import parse

RECIPES = {
    "7b": "prumerge_7b_lora",
    "13b": "prumerge_13b_lora",
    "next-7b": "llava_next_7b_lora",
    "onevision-0.5b": "llava_onevision_0_5b_lora",
}
SLICES = (
    "v5e:2x4", "v5p:2x2x2", "v6e:2x4",
    "v5e:8x8", "v5p:4x4x4", "v6e:8x8",
    "v5e:16x16", "v5p:4x8x8", "v6e:16x16",
)  # fmt: skip
REDUCTION = "prumerge+"
HEADER = (
    "| model | slice | mesh | batch | remat, rows, frozen | GiB per chip | PFLOP full "
    "| PFLOP reduced | micro-batches | ms full | ms reduced | MFU full | MFU reduced | gain |"
)


def plan(model: str, name: str, samples_per_chip: int, text_tokens: Sequence[int]) -> TrainingPlan:
    """The plan of a recipe with PruMerge+ on a slice, for the first of these numbers of text tokens
    per sample; it may be asked about the others, and about all visual tokens."""
    where = topology(name)
    config = recipes.load(RECIPES[model])
    config.reduction = REDUCTION
    config.batch_size = samples_per_chip * len(where.devices)
    parsed = parse(config)
    reduced = [assumed_samples(parsed, text) for text in text_tokens]
    full = [all_tokens(samples, parsed.sizes) for samples in reduced]
    return plan_training(config, where, reduced[0], [*reduced[1:], *full])


def all_tokens(samples: Samples, model: LlavaConfig) -> Samples:
    """The same samples without a reduction."""
    return dataclasses.replace(samples, visual_tokens=samples.crops * model.vision.num_patches)


def result(model: str, reduced: TrainingPlan) -> dict[str, Any]:
    """A row of the report: PruMerge+ against all tokens."""
    full = dataclasses.replace(reduced, samples=all_tokens(reduced.samples, reduced.model))
    values: dict[str, Any] = {
        "model": model,
        "slice": reduced.topology.name,
        "mesh": "x".join(str(size) for size in reduced.mesh.values()),
        "batch": reduced.samples.count,
        "remat": reduced.execution.remat,
        "rows": reduced.execution.rows_per_shard,
        "frozen": reduced.execution.frozen,
        "text_tokens": reduced.samples.text_tokens,
        "gib_per_chip": reduced.memory / 2**30,
        "gib_available": tpu(reduced.topology.chip).memory / 2**30,
    }
    for name, arm in (("full", full), ("reduced", reduced)):
        values |= {
            f"pflop_{name}": sum(arm.model_flops.values()) / 1e15,
            f"micro_batches_{name}": sum(arm.row_lengths) / arm.row_length,
            f"ms_{name}": 1e3 * arm.seconds,
            f"utilisation_{name}": arm.utilisation,
        }
    return {**values, "gain": full.seconds / reduced.seconds}


def row(values: dict[str, Any]) -> str:
    """One line of the table; see `HEADER`."""
    arms = ("full", "reduced")
    cells = [
        *(str(values[name]) for name in ("model", "slice", "mesh", "batch")),
        f"{values['remat']}, {values['rows']}, {values['frozen']}",
        f"{values['gib_per_chip']:.1f} of {values['gib_available']:.1f}",
        *(f"{values[f'pflop_{arm}']:.1f}" for arm in arms),
        " / ".join(f"{values[f'micro_batches_{arm}']:g}" for arm in arms),
        *(f"{values[f'ms_{arm}']:.0f}" for arm in arms),
        *(f"{100 * values[f'utilisation_{arm}']:.0f} %" for arm in arms),
        f"{values['gain']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def plan_record(model: str, reduced: TrainingPlan) -> dict[str, Any]:
    """A plan as JSON values."""
    programs = [dataclasses.asdict(program) for program, _ in reduced.programs]
    return {
        "model": model,
        "slice": reduced.topology.name,
        "mesh": dict(reduced.mesh),
        "samples": dataclasses.asdict(reduced.samples),
        "row_lengths": reduced.row_lengths,
        **dataclasses.asdict(reduced.execution),
        "resident": reduced.resident,
        "programs": programs,
        "rejected": reduced.rejected,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table, line by line."""
    jax.config.update("jax_platforms", "cpu")  # nothing runs; leave a TPU that is present free
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=["7b"], choices=RECIPES)
    parser.add_argument("--slices", nargs="+", default=["v5e:8x8"], help=f"or all: {SLICES}")
    parser.add_argument("--samples_per_chip", type=int, default=16)
    parser.add_argument("--text_tokens", type=int, nargs="+", default=[ASSUMED_TEXT_TOKENS, 60])
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    begin("tpu_plan", __doc__, minutes=3)
    slices = SLICES if arguments.slices == ["all"] else arguments.slices
    libtpu = importlib.metadata.version("libtpu")
    print(f"compiled with libtpu {libtpu}, not run; {arguments.samples_per_chip} samples per chip")
    text = arguments.text_tokens[0]
    plans, results, notes = [], [], []
    print(_heading(text), flush=True)
    for model, name in itertools.product(arguments.models, slices):
        try:
            found = plan(model, name, arguments.samples_per_chip, arguments.text_tokens)
            plans.append((model, found))
        except DoesNotFit as error:
            notes.append(f"{model} on {name} does not fit: {error}")
            print(f"| {model} | {name} | does not fit: {error} |", flush=True)
            continue
        results.append(result(*plans[-1]))
        print(row(results[-1]), flush=True)
    for text in arguments.text_tokens[1:]:
        print(f"\n{_heading(text)}")
        for model, reduced in plans:
            samples = dataclasses.replace(reduced.samples, text_tokens=text)
            results.append(result(model, dataclasses.replace(reduced, samples=samples)))
            print(row(results[-1]))
    if arguments.json is not None:
        record = measured("tpu_plan", arguments, results, notes)
        record["plans"] = [plan_record(*each) for each in plans]
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


def _heading(text: int) -> str:
    return f"{text} text tokens per sample\n\n{HEADER}\n{'|---' * HEADER.count(' | ')}|---|"


if __name__ == "__main__":
    main()
