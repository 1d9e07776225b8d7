"""The vision tower alone, and with the token reduction after it.

    python benchmarks/vision_tower.py

`tower` ends at the penultimate features, keys and CLS query; the other arms are the complete
`encode` step of a reduction, from uint8 pixels to visual tokens. `floor_ms` is the cost model's
for tower and merge, `utilisation` the model FLOPs over time and peak.
"""

import argparse
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measuring import add_rate_arguments, begin, interleaved, peak_rates, quartiles_ms, report
from models import add_geometry_argument, geometry, random_llava

from prumerge_jax import reductions
from prumerge_jax.cost import Workload, floor_seconds, operations
from prumerge_jax.engine import programs
from prumerge_jax.models.vision_tower import VisionFeatures

REDUCTIONS = {"encode full": "full", "encode prumerge": "prumerge", "encode prumerge+": "prumerge+"}


@functools.partial(jax.jit, static_argnames=("graphdef",))
def tower(graphdef: nnx.GraphDef, state: nnx.State, pixels: jax.Array) -> VisionFeatures:
    """[B, S, S, 3] normalised pixels to features."""
    return nnx.merge(graphdef, state).vision(pixels)


def main(argv: Sequence[str] | None = None) -> None:
    """Times the arms in turns at every batch size."""
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_geometry_argument(parser)
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 8] if on_cpu else [1, 8, 32, 128]
    )
    parser.add_argument("--repeats", type=int, default=5 if on_cpu else 20)
    add_rate_arguments(parser)
    arguments = parser.parse_args(argv)
    begin("vision_tower", __doc__, minutes=2)
    config, dtype = geometry(arguments.geometry), jnp.dtype(arguments.dtype)
    vision = config.vision
    chip = peak_rates(arguments.chip, dtype)
    model = random_llava(config, dtype)

    results = []
    for batch in arguments.batches:
        pixels = np.random.default_rng(0).integers(
            0, 256, (batch, vision.image_size, vision.image_size, 3), np.uint8
        )
        raw, normalised = jnp.asarray(pixels), jnp.asarray(pixels / 255, dtype)
        arms = {"tower": functools.partial(tower, *model, normalised)}
        for name, reduction in REDUCTIONS.items():
            arms[name] = functools.partial(
                programs.encode,
                *model,
                raw,
                reduction=reductions.parse(reduction),
                dtype=dtype,
            )
        seconds = interleaved(arms, arguments.repeats)
        for name in arms:
            # In the cost model, all patches mean no merge.
            merges = name in ("encode prumerge", "encode prumerge+")
            workload = Workload(vision.num_patches - merges, text_tokens=0, batch=batch)
            floors = floor_seconds(config, workload, chip)
            stages = operations(config, workload)
            flops = sum(step.flops for step in stages["vision"] + stages["merge"])
            floor = floors["vision"] + floors["merge"]
            median = float(np.median(seconds[name]))
            results.append(
                {
                    "arm": name,
                    "batch": batch,
                    **quartiles_ms(seconds[name]),
                    "images_per_s": batch / median,
                    "over_tower": median / float(np.median(seconds["tower"])) - 1,
                    "floor_ms": 1e3 * floor,
                    "floor_share": floor / median,
                    "utilisation": flops / median / chip.flops,
                }
            )
    report("vision_tower", arguments, results, chip=chip)


if __name__ == "__main__":
    main()
