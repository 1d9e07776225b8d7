"""The PruMerge step: ours, the reference's loop form in PyTorch, and the vision tower beside it.

    python benchmarks/prumerge_step.py

Hidden states and keys are random; the attention has exactly `--kept` outliers. Both programs must
give the same tokens before they are timed. `ratio` is the loop's time over ours; `tower_share` is
our step's time over that of the tower, which is timed at `--tower_batch` images and scaled; the
floor is the cost model's for the merge.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch_prumerge
from flax import nnx
from measuring import add_rate_arguments, interleaved, peak_rates, quartiles_ms, report
from models import GEOMETRIES, random_weights

from prumerge_jax import prumerge
from prumerge_jax.cost import Workload, floor_seconds
from prumerge_jax.models.attention import default_implementation
from prumerge_jax.models.clip import ClipVision, VisionFeatures
from prumerge_jax.models.config import VisionConfig

REDUCTIONS = ("prumerge", "prumerge+")


def outlier_attention(batch: int, patches: int, kept: int, seed: int) -> np.ndarray:
    """[B, N] float32 attention of which `kept` entries per image are outliers.

    The others are uniform, a distribution without outliers; the tail above them is heavy.
    """
    rng = np.random.default_rng(seed)
    attention = rng.uniform(1, 2, (batch, patches))
    for row in attention:
        row[rng.choice(patches, kept, replace=False)] = 4 + rng.exponential(8, kept)
    return (0.9 * attention / attention.sum(-1, keepdims=True)).astype(np.float32)


def check_equal(
    ours: prumerge.VisualTokens, theirs: Sequence[torch.Tensor], tolerance: float = 1e-4
) -> None:
    """Compares the tokens of both programs.

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
    graphdef, state = random_weights(lambda rngs: ClipVision(config, rngs=rngs), dtype)
    pixels = jnp.zeros((batch, config.image_size, config.image_size, 3), dtype)
    implementation = default_implementation(dtype, config.width // config.num_heads)

    @jax.jit
    def tower(state: nnx.State, pixels: jax.Array) -> VisionFeatures:
        return nnx.merge(graphdef, state)(pixels, implementation=implementation)

    seconds = interleaved({"tower": lambda: tower(state, pixels)}, repeats)
    return float(np.median(seconds["tower"]))


def main(argv: Sequence[str] | None = None) -> None:
    """Checks, times and reports."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--kept", type=int, default=128, help="outliers per image, below N / 4")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--geometry", default="7b", choices=GEOMETRIES, help="sizes of the tower (%(default)s)"
    )
    parser.add_argument("--tower_batch", type=int, default=1, help="images per run of the tower")
    add_rate_arguments(parser)
    arguments = parser.parse_args(argv)
    model = GEOMETRIES[arguments.geometry]
    vision, dtype = model.vision, jnp.dtype(arguments.dtype)
    chip = peak_rates(arguments.chip, dtype)

    rng = np.random.default_rng(0)
    shape = (arguments.batch, vision.num_patches, vision.width)
    hidden, keys = (rng.standard_normal(shape, np.float32) for _ in range(2))
    attention = outlier_attention(*shape[:2], arguments.kept, seed=1)
    on_device = jnp.asarray(hidden, dtype), jnp.asarray(keys), jnp.asarray(attention)
    in_torch = [torch.from_numpy(x) for x in (hidden, keys, attention)]
    step = jax.jit(prumerge.reduce_tokens, static_argnames="config")

    arms: dict[str, Callable[[], Any]] = {}
    lengths: dict[str, float] = {}
    for name in REDUCTIONS:
        ours = functools.partial(step, *on_device, config=prumerge.preset(name))
        loop = functools.partial(
            torch_prumerge.reduce_tokens, *in_torch, spatial=name == "prumerge+"
        )
        visual = ours()
        check_equal(visual, loop(), tolerance=1e-4 if dtype == jnp.float32 else 0.25)
        lengths[name] = float(visual.lengths.mean())
        arms |= {name: ours, f"{name} loop": loop}
    seconds = interleaved(arms, arguments.repeats)
    tower = tower_seconds(vision, arguments.tower_batch, dtype, max(3, arguments.repeats // 5))
    tower *= arguments.batch / arguments.tower_batch

    results = []
    for name in REDUCTIONS:
        workload = Workload(lengths[name], text_tokens=0, batch=arguments.batch)
        floor = floor_seconds(model, workload, chip)["merge"]
        median = float(np.median(seconds[name]))
        results.append(
            {
                "reduction": name,
                "visual_tokens": lengths[name],
                **quartiles_ms(seconds[name]),
                "loop_ms": 1e3 * float(np.median(seconds[f"{name} loop"])),
                "ratio": float(np.median(seconds[f"{name} loop"])) / median,
                "floor_ms": 1e3 * floor,
                "floor_share": floor / median,
                "tower_ms": 1e3 * tower,
                "tower_share": median / tower,
            }
        )
    notes = [f"tower timed at {arguments.tower_batch} images, scaled to {arguments.batch}"]
    report("prumerge_step", arguments, results, chip=chip, notes=notes)


if __name__ == "__main__":
    main()
