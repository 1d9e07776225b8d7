"""LoRA training planned on TPU slices: compiled ahead of time, not run.

    python benchmarks/tpu_plan.py

One line per model and slice: the recipe with PruMerge+ at 144 visual tokens per image against all
576, at the same global batch of `--samples_per_chip` per chip. Both run the same programs: rows are
packed, so fewer tokens are fewer micro-batches. Needs libtpu (`pip install 'prumerge_jax[tpu]'`),
and no TPU; a slice takes a minute or more to compile for.
"""

import argparse
import dataclasses
import importlib.metadata
import json
from collections.abc import Sequence
from typing import Any

import jax

from prumerge_jax.aot.assumptions import mean_visual_tokens
from prumerge_jax.aot.compile import DoesNotFit, tpu
from prumerge_jax.aot.topology import topology
from prumerge_jax.aot.training import (
    ASSUMED_TEXT_TOKENS,
    Samples,
    TrainingPlan,
    plan_training,
)
from prumerge_jax.cli import recipes
from prumerge_jax.training.config import parse

RECIPES = {"7b": "prumerge_7b_lora", "13b": "prumerge_13b_lora"}
SLICES = (
    "v5e:2x4", "v5p:2x2x2", "v6e:2x4",
    "v5e:8x8", "v5p:4x4x4", "v6e:8x8",
    "v5e:16x16", "v5p:4x8x8", "v6e:16x16",
)  # fmt: skip
REDUCTION = "prumerge+"
HEADER = (
    "| model | slice | mesh | batch | GiB per chip | PFLOP full | PFLOP 144 | micro-batches "
    "| ms full | ms 144 | MFU full | MFU 144 | gain |"
)


def plan(model: str, name: str, samples_per_chip: int, text_tokens: int) -> TrainingPlan:
    """The plan of a recipe with PruMerge+ on a slice."""
    where = topology(name)
    config = recipes.load(RECIPES[model])
    config.reduction = REDUCTION
    config.batch_size = samples_per_chip * len(where.devices)
    visual, source = mean_visual_tokens(REDUCTION, parse(config).sizes.vision)
    samples = Samples(config.batch_size, visual, text_tokens, source)
    return plan_training(config, where, samples)


def row(model: str, reduced: TrainingPlan) -> str:
    """One line of the table; see `HEADER`."""
    visual = reduced.model.vision.num_patches
    full = dataclasses.replace(
        reduced, samples=dataclasses.replace(reduced.samples, visual_tokens=visual)
    )
    mesh = "x".join(str(size) for size in reduced.mesh.values())
    available = tpu(reduced.topology.chip).memory / 2**30
    arms = (full, reduced)
    cells = [
        model,
        reduced.topology.name,
        mesh,
        str(reduced.samples.count),
        f"{reduced.memory / 2**30:.1f} of {available:.1f}",
        *(f"{sum(arm.model_flops.values()) / 1e15:.1f}" for arm in arms),
        " / ".join(str(arm.micro_batches) for arm in arms),
        *(f"{1e3 * arm.seconds:.0f}" for arm in arms),
        *(f"{100 * arm.utilisation:.0f} %" for arm in arms),
        f"{full.seconds / reduced.seconds:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def record(model: str, reduced: TrainingPlan) -> dict[str, Any]:
    """A plan as JSON values."""
    programs = [dataclasses.asdict(program) for program, _ in reduced.programs]
    return {
        "model": model,
        "slice": reduced.topology.name,
        "mesh": dict(reduced.mesh),
        "samples": dataclasses.asdict(reduced.samples),
        "row_positions": reduced.row_positions,
        "resident": reduced.resident,
        "programs": programs,
        "rejected": reduced.rejected,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table, line by line."""
    jax.config.update("jax_platforms", "cpu")  # nothing runs; leave a TPU that is present free
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--slices", nargs="+", default=SLICES)
    parser.add_argument("--samples_per_chip", type=int, default=16)
    parser.add_argument("--text_tokens", type=int, nargs="+", default=[ASSUMED_TEXT_TOKENS, 60])
    parser.add_argument("--json", help="also write the plans to this file, one per line")
    arguments = parser.parse_args(argv)
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "libtpu"))
    print(f"compiled with {versions}, not run; {arguments.samples_per_chip} samples per chip")
    text = arguments.text_tokens[0]
    print(f"{text} text tokens per sample\n\n{HEADER}\n{'|---' * HEADER.count(' | ')}|---|")
    plans = []
    for model in arguments.models:
        for name in arguments.slices:
            try:
                plans.append((model, plan(model, name, arguments.samples_per_chip, text)))
            except DoesNotFit as error:
                print(f"| {model} | {name} | does not fit: {error} |", flush=True)
                continue
            print(row(*plans[-1]), flush=True)
            if arguments.json:
                with open(arguments.json, "a") as file:
                    print(json.dumps(record(*plans[-1])), file=file)
    for text in arguments.text_tokens[1:]:
        print(f"\n{text} text tokens per sample\n\n{HEADER}\n{'|---' * HEADER.count(' | ')}|---|")
        for model, reduced in plans:
            samples = dataclasses.replace(reduced.samples, text_tokens=text)
            print(row(model, dataclasses.replace(reduced, samples=samples)))


if __name__ == "__main__":
    main()
