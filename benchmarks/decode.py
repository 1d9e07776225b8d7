"""Greedy decoding in slots.

    python benchmarks/decode.py

Every slot holds a sequence of `--context` tokens and produces `--steps` more in one dispatch.
`floor_ms` is the cost model's for one step at the mean context, `floor_share` the floor over the
measured step, which on memory-bound shapes is the share of the bandwidth.
"""

import argparse
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measuring import add_rate_arguments, interleaved, peak_rates, quartiles_ms, report
from models import add_geometry_argument, geometry, random_llava_for_inference

from prumerge_jax.cost import Workload, operations
from prumerge_jax.engine import programs
from prumerge_jax.engine.request import MAX_STOP_IDS


def decoding(
    model: tuple[nnx.GraphDef, nnx.State],
    slots: int,
    context: int,
    steps: int,
    dtype: jnp.dtype,
) -> Callable[[], jax.Array]:
    """`steps` tokens for every slot, each time from the same context."""
    length = context + steps
    cache = programs.empty_slots(*model, slots=slots, length=length, dtype=dtype).cache

    def run() -> jax.Array:
        nonlocal cache
        shape = (slots,)
        busy = programs.Slots(  # all of it is donated, so no two arrays share memory
            cache=cache,
            lengths=jnp.full(shape, context, jnp.int32),
            positions=jnp.full(shape, context, jnp.int32),
            token=jnp.ones(shape, jnp.int32),
            remaining=jnp.full(shape, steps + 1, jnp.int32),
            drawn=jnp.ones(shape, jnp.int32),
            sampling=programs.Sampling(
                temperature=jnp.zeros(shape),
                top_p=jnp.ones(shape),
                seed=jnp.zeros(shape, jnp.uint32),
                stop_ids=jnp.full((slots, MAX_STOP_IDS), -1, jnp.int32),
            ),
        )
        after, emitted = programs.decode(
            *model,
            busy,
            steps=steps,
        )
        cache = after.cache
        return emitted

    return run


def main(argv: Sequence[str] | None = None) -> None:
    """Times every number of slots in turns."""
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_geometry_argument(parser)
    parser.add_argument(
        "--slots", type=int, nargs="+", default=[1, 8, 16] if on_cpu else [1, 8, 32, 256]
    )
    parser.add_argument("--context", type=int, default=100, help="tokens before the first step")
    parser.add_argument("--steps", type=int, default=8 if on_cpu else 32)
    parser.add_argument("--repeats", type=int, default=5 if on_cpu else 20)
    add_rate_arguments(parser)
    arguments = parser.parse_args(argv)
    config, dtype = geometry(arguments.geometry), jnp.dtype(arguments.dtype)
    chip = peak_rates(arguments.chip, dtype)
    model = random_llava_for_inference(config, dtype)
    context, steps = arguments.context, arguments.steps

    arms = {slots: decoding(model, slots, context, steps, dtype) for slots in arguments.slots}
    seconds = interleaved(arms, arguments.repeats)
    results = []
    for slots, times in seconds.items():
        per_step = [total / steps for total in times]
        median = float(np.median(per_step))
        middle = Workload(context + steps / 2, 0, batch=slots, output_tokens=2)
        (step,) = operations(config, middle)["decode"]
        floor = step.seconds(chip)
        results.append(
            {
                "slots": slots,
                "context": context,
                **quartiles_ms(per_step),
                "tokens_per_s": slots / median,
                "bound": step.bound(chip),
                "floor_ms": 1e3 * floor,
                "floor_share": floor / median,
                "utilisation": step.flops / median / chip.flops,
            }
        )
    report("decode", arguments, results, chip=chip)


if __name__ == "__main__":
    main()
