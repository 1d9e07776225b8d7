"""Positions that a training step computes on a mesh, over those that its samples need.

    python benchmarks/packing.py
    python benchmarks/packing.py --crops 3 5 10 --row_length 8192

The fullest data shard decides how many micro-batches all of them run. Samples in the order in which
they are read, against samples dealt out to the shards by their text, and by the crops that they
show as well; micro-batches of one length, against a last one with shorter rows. Lengths are drawn:
text lognormal, visual tokens of a crop normal around PruMerge+'s 144, and numbers of crops among
`--crops`. Nothing is trained, no device is used. `crops_over_mean`: most crops of a shard over the
mean, which is how much room the batch needs (`crops_per_sample`).
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


def draw(
    count: int, crops: Sequence[int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of text, crops and visual tokens of samples, int [count] each."""
    text = np.clip(rng.lognormal(np.log(TEXT), TEXT_SPREAD, count), 20, 1400)
    of_crop = np.clip(rng.normal(VISUAL, VISUAL_SPREAD, count), 20, SLOTS)
    shown = rng.choice(crops, count)
    return text.astype(int), shown, (shown * of_crop).astype(int)


def requests_of(text: np.ndarray, visual: np.ndarray) -> list[packing.Request]:
    """Samples of one image each, in the order of their images."""
    found, most = [], int(visual.max())
    for row, (words, tokens) in enumerate(zip(text.tolist(), visual.tolist(), strict=True)):
        ids = np.full(words + 1, 5, np.int32)
        ids[0] = IMAGE_TOKEN
        slots = np.arange(tokens, dtype=np.int32)
        found.append(packing.Request(ids, (Run(row * most + slots, slots, most),), ids))
    return found


def positions(text: np.ndarray, visual: np.ndarray, shards: int, lengths: Sequence[int]) -> int:
    """Positions of a step, over all shards with one row each."""
    pack = functools.partial(
        packing.pack_window,
        num_slots=len(text) * int(visual.max()),
        num_rows=shards,
        shards=shards,
    )
    windows = fewest_positions(requests_of(text, visual), pack, lengths)
    return sum(rows.ids.size for rows in windows)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Means over steps: `over_needed`, computed to needed positions, and `crops_over_mean`."""
    shards, rng = arguments.shards, np.random.default_rng(0)
    lengths = RowShape(shards, arguments.row_length).lengths
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(arguments.steps):
        text, crops, visual = draw(arguments.samples_per_shard * shards, arguments.crops, rng)
        orders = {"as read": np.arange(len(text)), "dealt": dealt(text, shards)}
        if len(arguments.crops) > 1:
            # PruMerge+ may keep all patches of a crop; how many it keeps is not known yet.
            orders["dealt by crops too"] = dealt(text + SLOTS * crops, shards)
        needed = int((text + visual).sum())
        for name, order in orders.items():
            most = crops[order].reshape(shards, -1).sum(1).max() * shards / crops.sum()
            for end, allowed in (("one length", lengths[-1:]), ("last one shorter", lengths)):
                computed = positions(text[order], visual[order], shards, allowed)
                found.setdefault(f"{name}, {end}", []).append((computed / needed, most))
    return [
        dict(zip(("arm", "over_needed", "crops_over_mean"), (arm, *map(float, means)), strict=True))
        for arm, means in ((arm, np.mean(each, axis=0)) for arm, each in found.items())
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Prints one line per way to pack."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=int, default=64, help="data shards of the mesh")
    parser.add_argument("--samples_per_shard", type=int, default=16)
    parser.add_argument(
        "--crops", type=int, nargs="+", default=[1], help="crops of a sample, equally likely"
    )
    parser.add_argument("--row_length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=10, help="global batches drawn")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    begin("packing", __doc__, minutes=1)
    results = measure(arguments)
    report("packing", arguments, results)


if __name__ == "__main__":
    main()
