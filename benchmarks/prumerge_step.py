"""The PruMerge step: ours, the reference's loop form in PyTorch, and the vision tower.

    python benchmarks/prumerge_step.py

Hidden states and keys are random; the attention has exactly `--kept` outliers (`--kept_plus` for
PruMerge+, which adds its spatial samples). Both forms must give the same tokens before they are
timed; without PyTorch, and with `--no-loop`, ours is alone, and `loop_ms` and `ratio` are null.
`ratio` is the loop's time over ours, the loop at the better of one and all threads; `tower_share`
is our step's time over that of the tower, which is timed at `--tower_batch` images and scaled; the
floor is the cost model's for merging as many tokens as are kept.
"""

import argparse
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measuring import add_rate_arguments, begin, interleaved, peak_rates, report
from models import GEOMETRIES, outlier_attention, random_weights

from prumerge_jax import prumerge
from prumerge_jax.cost import Operation, Workload, operations
from prumerge_jax.models.config import VisionConfig

try:
    import torch
    import torch_prumerge
except ModuleNotFoundError:
    torch = torch_prumerge = None
from prumerge_jax.models.vision_tower import VisionFeatures, VisionTower


def check_equal(
    ours: prumerge.VisualTokens, theirs: "Sequence[torch.Tensor]", tolerance: float = 1e-4
) -> None:
    """Compares the tokens of both forms.

    One token in a hundred may differ: where two neighbours are equally similar but for rounding,
    either may be the last one that is merged.

    Raises:
      ValueError: another number of tokens, or values further apart than `tolerance`.
    """
    for image, expected in enumerate(theirs):
        got = np.asarray(ours.tokens[image, : ours.lengths[image]], np.float32)
        if got.shape != expected.shape:
            raise ValueError(f"image {image}: {len(got)} tokens, the loop gives {len(expected)}")
        error = np.abs(got - expected.numpy()).max(-1)
        if np.mean(error > tolerance) > 0.01:
            raise ValueError(
                f"image {image}: {np.sum(error > tolerance)} of {len(error)} tokens differ by more "
                f"than {tolerance}, by up to {error.max()}"
            )


def tower_seconds(config: VisionConfig, batch: int, dtype: jnp.dtype, repeats: int) -> float:
    """Median time of the tower over `batch` images, random weights."""
    graphdef, state = random_weights(lambda rngs: VisionTower(config, rngs=rngs), dtype)
    pixels = jnp.zeros((batch, config.image_size, config.image_size, 3), dtype)

    @jax.jit
    def tower(state: nnx.State, pixels: jax.Array) -> VisionFeatures:
        return nnx.merge(graphdef, state)(pixels)

    seconds = interleaved({"tower": lambda: tower(state, pixels)}, repeats)
    return float(np.median(seconds["tower"]))


def use_best_threads(loop: Callable[[], Any]) -> int:
    """Sets PyTorch to one thread or to all of its threads, whichever runs the loop faster."""
    seconds = {}
    for threads in {1, torch.get_num_threads()}:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        loop()
        seconds[threads] = time.perf_counter() - start
    best = min(seconds, key=lambda threads: seconds[threads])
    torch.set_num_threads(best)
    return best


def main(argv: Sequence[str] | None = None) -> None:
    """Checks, times and reports."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument(
        "--kept", type=int, nargs="+", default=[128, 40], help="outliers per image, below N / 4"
    )
    parser.add_argument("--kept_plus", type=int, nargs="+", default=[40], help="for PruMerge+")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--geometry", default="7b", choices=GEOMETRIES, help="sizes of the tower (%(default)s)"
    )
    parser.add_argument("--loop", action=argparse.BooleanOptionalAction, default=torch is not None)
    parser.add_argument("--tower_batch", type=int, default=1, help="images per run of the tower")
    add_rate_arguments(parser)
    arguments = parser.parse_args(argv)
    begin("prumerge_step", __doc__, minutes=1)
    model = GEOMETRIES[arguments.geometry]
    vision, dtype = model.vision, jnp.dtype(arguments.dtype)
    chip = peak_rates(arguments.chip, dtype)

    rng = np.random.default_rng(0)
    shape = (arguments.batch, vision.num_patches, vision.width)
    hidden, keys = (rng.standard_normal(shape, np.float32) for _ in range(2))
    in_jax = jnp.asarray(hidden, dtype), jnp.asarray(keys)
    step = jax.jit(prumerge.reduce_tokens, static_argnames="config")

    cases = [("prumerge", kept) for kept in arguments.kept]
    cases += [("prumerge+", kept) for kept in arguments.kept_plus]
    arms: dict[str, Callable[[], Any]] = {}
    lengths: dict[str, float] = {}
    for name, kept in cases:
        attention = outlier_attention(*shape[:2], kept, seed=1)
        ours = functools.partial(
            step, *in_jax, jnp.asarray(attention), config=prumerge.preset(name)
        )
        visual = ours()
        lengths[f"{name} {kept}"] = float(visual.lengths.mean())
        arms[f"{name} {kept}"] = ours
        if arguments.loop:
            loop = functools.partial(
                torch_prumerge.reduce_tokens,
                *map(torch.from_numpy, (hidden, keys, attention)),
                spatial=name == "prumerge+",
            )
            check_equal(visual, loop(), tolerance=1e-4 if dtype == jnp.float32 else 0.25)
            arms[f"{name} {kept} loop"] = loop
    notes = []
    if arguments.loop:
        notes = [f"PyTorch loop on {use_best_threads(loop)} of {os.cpu_count()} cores"]
    seconds = {arm: np.median(times) for arm, times in interleaved(arms, arguments.repeats).items()}
    tower = tower_seconds(vision, arguments.tower_batch, dtype, max(3, arguments.repeats // 3))
    tower *= arguments.batch / arguments.tower_batch

    (every_row,) = operations(model, Workload(0, 0, arguments.batch))["merge"]
    results = []
    for case, visual_tokens in lengths.items():
        share = visual_tokens / vision.num_patches
        floor = Operation(every_row.flops * share, every_row.bytes).seconds(chip)
        loop_seconds = seconds.get(f"{case} loop")
        results.append(
            {
                "case": case,
                "visual_tokens": visual_tokens,
                "ms": 1e3 * seconds[case],
                "loop_ms": 1e3 * loop_seconds if loop_seconds else None,
                "ratio": loop_seconds / seconds[case] if loop_seconds else None,
                "floor_ms": 1e3 * floor,
                "floor_share": floor / seconds[case],
                "tower_ms": 1e3 * tower,
                "tower_share": seconds[case] / tower,
            }
        )
    notes.append(f"tower timed at {arguments.tower_batch} images, scaled to {arguments.batch}")
    report("prumerge_step", arguments, results, chip=chip, notes=notes)


if __name__ == "__main__":
    main()
