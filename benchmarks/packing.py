"""Positions that a training step computes on a mesh, over those that its samples need.

    python benchmarks/packing.py

The fullest data shard decides how many micro-batches all of them run. Samples in the order in which
they are read, against samples dealt out to the shards by their text; micro-batches of one
length, against a last one with shorter rows. Lengths are drawn: text lognormal, visual tokens
normal around PruMerge+'s 144. Nothing is trained, no device is used.
"""

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from measuring import add_arguments, begin, report

from prumerge_jax.data import packing
from prumerge_jax.data.runs import Run
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.training.batches import RowShape, fewest_positions
from prumerge_jax.training.inputs import dealt

SLOTS = 576
TEXT, TEXT_SPREAD = 160.0, 0.67
"""Median, and sigma of the logarithm: a mean of 200 tokens."""
VISUAL, VISUAL_SPREAD = 144.0, 40.0


def draw(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Text and visual tokens of samples, int [count] each."""
    text = np.clip(rng.lognormal(np.log(TEXT), TEXT_SPREAD, count), 20, 1400)
    visual = np.clip(rng.normal(VISUAL, VISUAL_SPREAD, count), 20, SLOTS)
    return text.astype(int), visual.astype(int)


def requests_of(text: np.ndarray, visual: np.ndarray) -> list[packing.Request]:
    """Samples of one image each, in the order of their images."""
    found = []
    for row, (words, tokens) in enumerate(zip(text.tolist(), visual.tolist(), strict=True)):
        ids = np.full(words + 1, 5, np.int32)
        ids[0] = IMAGE_TOKEN
        slots = np.arange(tokens, dtype=np.int32)
        found.append(packing.Request(ids, (Run(row * SLOTS + slots, slots, SLOTS),), ids))
    return found


def positions(text: np.ndarray, visual: np.ndarray, shards: int, lengths: Sequence[int]) -> int:
    """Positions of a step, over all shards with one row each."""
    pack = functools.partial(
        packing.pack_window, num_slots=len(text) * SLOTS, num_rows=shards, shards=shards
    )
    windows = fewest_positions(requests_of(text, visual), pack, lengths)
    return sum(rows.ids.size for rows in windows)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Mean ratios of computed to needed positions: `over_needed`."""
    shards, rng = arguments.shards, np.random.default_rng(0)
    lengths = RowShape(shards, arguments.row_length).lengths
    ratios: dict[str, list[float]] = {}
    for _ in range(arguments.steps):
        text, visual = draw(arguments.samples_per_shard * shards, rng)
        order = dealt(text, shards)
        needed = int((text + visual).sum())
        for name, chosen, allowed in (
            ("as read, one length", slice(None), lengths[-1:]),
            ("as read, last one shorter", slice(None), lengths),
            ("dealt, one length", order, lengths[-1:]),
            ("dealt, last one shorter", order, lengths),
        ):
            computed = positions(text[chosen], visual[chosen], shards, allowed)
            ratios.setdefault(name, []).append(computed / needed)
    return [{"arm": name, "over_needed": float(np.mean(each))} for name, each in ratios.items()]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one line per way to pack."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=int, default=64, help="data shards of the mesh")
    parser.add_argument("--samples_per_shard", type=int, default=16)
    parser.add_argument("--row_length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10, help="global batches drawn")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    begin("packing", __doc__, minutes=1)
    results = measure(arguments)
    report("packing", arguments, results)


if __name__ == "__main__":
    main()
