"""Greedy decoding in slots, of sequences as long as the reductions make them.

    python benchmarks/decode.py

Lengths are drawn: visual tokens from a lognormal distribution with the paper's mean of the
reduction, `--text_tokens`, and a part of the `--new_tokens` that follow. Shapes, pool and page
table are those that the engine chooses for such requests. Every run decodes `--steps` tokens in
every slot in one dispatch, always from the same lengths.

`floor_ms` is the cost model's for one step at the mean length: all weights read once, and the keys
and values of valid tokens; `floor_share` is the floor over the measured step. `over_full` is tokens
per second over those of `full` with as many slots. `kv_allocated_over_valid` is pages given out
over valid tokens, the mean over a run of the engine; `kv_read_over_valid` what a step reads of
them.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from drawn import MEANS, drawn_counts
from flax import nnx
from measuring import add_rate_arguments, begin, interleaved, peak_rates, quartiles_ms, report
from models import add_geometry_argument, geometry, random_llava_for_inference

from prumerge_jax import reductions
from prumerge_jax.cost import Chip, Workload, counts, operations
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.engine import programs
from prumerge_jax.engine.pages import PagePool
from prumerge_jax.engine.request import MAX_STOP_IDS, Opening
from prumerge_jax.engine.sampling import Sampling
from prumerge_jax.engine.shapes import EngineConfig, EngineShapes, fit
from prumerge_jax.models.attention import tokens_read
from prumerge_jax.models.config import LlavaConfig

DRAWS = 2000


class Traffic(NamedTuple):
    """Tokens of a run of the engine, and of one timed call.

    Attributes:
      allocated_over_valid: mean over the run.
      read_over_valid: mean over the timed steps.
      valid: mean number of valid tokens per sequence in the timed steps.
    """

    allocated_over_valid: float
    read_over_valid: float
    valid: float


class Decoding:
    """Slots full of sequences in the pages that the engine would give them."""

    def __init__(
        self,
        model: tuple[nnx.GraphDef, nnx.State],
        shapes: EngineShapes,
        lengths: np.ndarray,
        steps: int,
        dtype: jnp.dtype,
    ) -> None:
        self.model, self.steps = model, steps
        pool, size = PagePool(shapes.pool_pages), shapes.page_size
        tables = np.zeros((shapes.slots, shapes.table_width), np.int32)
        for table, length in zip(tables, lengths.tolist(), strict=True):
            held = pool.take(-(-(length + steps) // size))
            table[: len(held)] = held
        self.lengths, self.tables = jnp.asarray(lengths, jnp.int32), jnp.asarray(tables)
        self.active = jnp.ones(shapes.slots, bool)
        self.pages = programs.empty_pages(
            *model, pages=shapes.pool_pages, page_size=size, dtype=dtype
        )

    def __call__(self) -> jax.Array:
        """`steps` tokens for every slot."""
        ones = jnp.ones_like(self.lengths)
        slots = programs.Slots(  # all of it is donated, so no two arrays share memory
            lengths=self.lengths * ones,
            positions=self.lengths * ones,
            token=jnp.ones_like(ones),
            remaining=ones * (self.steps + 1),
            drawn=jnp.ones_like(ones),
            sampling=Sampling(
                temperature=jnp.zeros(ones.shape),
                top_p=jnp.ones(ones.shape),
                seed=jnp.zeros(ones.shape, jnp.uint32),
                stop_ids=jnp.full((len(ones), MAX_STOP_IDS), -1, jnp.int32),
            ),
        )
        _, self.pages, emitted = programs.decode(
            *self.model, slots, self.pages, self.tables, self.active, steps=self.steps
        )
        return emitted


def counts_of(name: str, patches: int, number: int) -> np.ndarray:
    """Visual tokens of `number` images."""
    reduction = reductions.parse(name)
    if not reduction.varying:
        return np.full(number, patches)
    most = reduction.capacity_for(patches)
    drawn = drawn_counts(number, MEANS[name] * patches / 576, most, seed=0)
    return np.maximum(drawn, 2)  # one patch and the extra token


def shapes_of(
    name: str, config: LlavaConfig, slots: int, arguments: argparse.Namespace
) -> EngineShapes:
    """The engine's shapes for such requests, each about an image of its own."""
    prompt = np.full(1 + arguments.text_tokens, IMAGE_TOKEN)
    prompt[1:] = 1
    return fit(
        EngineConfig(slots=slots, page_size=arguments.page_size),
        reductions.parse(name),
        config.vision.num_patches,
        [Opening(prompt, (image,)) for image in range(DRAWS)],
        max_new_tokens=arguments.new_tokens,
        max_positions=config.text.max_positions,
    )


def traffic(
    prompts: np.ndarray,
    lengths: np.ndarray,
    shapes: EngineShapes,
    config: LlavaConfig,
    arguments: argparse.Namespace,
    dtype: jnp.dtype,
) -> Traffic:
    """What the pages of these sequences hold, and what the timed steps read of them.

    Pages given to a sequence depend on its own length alone: before every call of `decode` as many
    as the steps of the call may fill.
    """
    size, per_call = shapes.page_size, shapes.decode_steps_per_call
    final = prompts + arguments.new_tokens - 1
    allocated = valid = 0
    for done in range(0, arguments.new_tokens - 1, per_call):
        after = np.minimum(prompts + done + per_call, final)
        allocated += int((-(-after // size) * size).sum())
        valid += ((prompts + done + after) / 2).sum()
    steps = [lengths + step for step in range(1, arguments.steps + 1)]
    read = sum(tokens_read(step, size, dtype, config.text.head_dim) for step in steps)
    return Traffic(allocated / valid, read / np.sum(steps), float(np.mean(steps)))


def result(
    name: str,
    slots: int,
    seconds: Sequence[float],
    full: float,
    measured: Traffic,
    config: LlavaConfig,
    chip: Chip,
    dtype: jnp.dtype,
) -> dict[str, Any]:
    """One line of the report; `seconds` are those of single steps, `full` the median of `full`."""
    median = float(np.median(seconds))
    workload = Workload(measured.valid - 1, 0, batch=slots, output_tokens=2)
    (step,) = operations(config, workload)["decode"]
    floor = step.seconds(chip)
    kv = counts.kv_bytes_per_token(config.text) * dtype.itemsize / counts.ACTIVATION_BYTES
    return {
        "reduction": name,
        "slots": slots,
        "tokens": measured.valid,
        **quartiles_ms(seconds),
        "tokens_per_s": slots / median,
        "over_full": full / median,
        "bound": step.bound(chip),
        "floor_ms": 1e3 * floor,
        "floor_share": floor / median,
        "kv_allocated_over_valid": measured.allocated_over_valid,
        "kv_read_over_valid": measured.read_over_valid,
        "kv_mb_per_sequence": measured.valid * measured.allocated_over_valid * kv / 1e6,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Times every reduction and number of slots in turns."""
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_geometry_argument(parser)
    parser.add_argument("--reduction", nargs="+", default=list(MEANS), choices=MEANS)
    parser.add_argument(
        "--slots", type=int, nargs="+", default=[8, 16, 32] if on_cpu else [8, 32, 128]
    )
    parser.add_argument("--text_tokens", type=int, default=60, help="tokens of every prompt")
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens of every answer")
    parser.add_argument("--page_size", type=int, help="tokens per page (default: the platform's)")
    parser.add_argument("--steps", type=int, default=8 if on_cpu else 16, help="steps per run")
    parser.add_argument("--repeats", type=int, default=5 if on_cpu else 20)
    add_rate_arguments(parser)
    arguments = parser.parse_args(argv)
    begin("decode", __doc__, minutes=4)
    config, dtype = geometry(arguments.geometry), jnp.dtype(arguments.dtype)
    model = random_llava_for_inference(config, dtype)
    chip = peak_rates(arguments.chip, dtype)

    arms: dict[str, Decoding] = {}
    measured: dict[str, Traffic] = {}
    once = 0.0
    number = len(arguments.reduction) * len(arguments.slots)
    print(f"{number} arms are compiled, half a minute each at most, then timed", flush=True)
    for slots in arguments.slots:
        for name in arguments.reduction:
            shapes = shapes_of(name, config, slots, arguments)
            prompts = arguments.text_tokens + counts_of(name, config.vision.num_patches, DRAWS)
            room = max(arguments.new_tokens - arguments.steps, 1)
            lengths = prompts[:slots] + np.random.default_rng(1).integers(0, room, slots)
            arm = f"{name} {slots}"
            measured[arm] = traffic(prompts, lengths, shapes, config, arguments, dtype)
            arms[arm] = Decoding(model, shapes, lengths, arguments.steps, dtype)
            start = time.perf_counter()
            jax.block_until_ready(arms[arm]())
            middle = time.perf_counter()
            jax.block_until_ready(arms[arm]())
            once += time.perf_counter() - middle
            print(f"  {arm}: {middle - start:.0f} s", flush=True)
    print(f"timing: about {once * (arguments.repeats + 1):.0f} s", flush=True)
    seconds = interleaved(arms, arguments.repeats)
    results = []
    for arm, times in seconds.items():
        name, slots = arm.split()
        per_step = [total / arguments.steps for total in times]
        full = seconds.get(f"full {slots}", times)
        results.append(
            result(
                name,
                int(slots),
                per_step,
                float(np.median(full)) / arguments.steps,
                measured[arm],
                config,
                chip,
                dtype,
            )
        )
    report("decode", arguments, results, chip=chip)


if __name__ == "__main__":
    main()
