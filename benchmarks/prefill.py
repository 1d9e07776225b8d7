"""Packed rows through the projector and the decoder.

    python benchmarks/prefill.py

Rows are filled with equal segments of `--visual` and `--text_tokens` tokens; what is left of a row
is padding. `read` is the prefill of scoring, `prefill` that of generation, which writes keys and
values into pages; both end with the head at the last position of every segment. `utilisation` is
the FLOPs of the real tokens (causal attention, no padding) over time and peak, `floor_ms` the cost
model's for projector and prefill, `efficiency` real over computed tokens.
"""

import argparse
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measuring import add_rate_arguments, begin, interleaved, peak_rates, quartiles_ms, report
from models import add_geometry_argument, geometry, random_llava_for_inference

from prumerge_jax.cost import Workload, floor_seconds, operations
from prumerge_jax.data import packing
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.data.visual_layout import CropTokens, runs
from prumerge_jax.engine import programs
from prumerge_jax.engine.request import MAX_STOP_IDS
from prumerge_jax.engine.sampling import Sampling
from prumerge_jax.models import tuning


def packed_rows(visual: int, text: int, length: int, rows: int) -> tuple[packing.Rows, int]:
    """Rows full of equal segments, each with its own image; and the number of segments."""
    number = length // (visual + text) * rows
    crops = CropTokens(
        np.full(number, visual, np.int32), np.zeros((number, visual), np.int32), visual
    )
    ids = np.arange(text, dtype=np.int32) % 100
    requests = [
        packing.Request(np.insert(ids, 1, IMAGE_TOKEN), (run,))
        for run in runs(crops, range(number))
    ]
    (filled,) = packing.pack_window(requests, crops.num_slots, length, rows)
    return filled, number


def arms(
    model: tuple[nnx.GraphDef, nnx.State], rows: packing.Rows, tokens: jax.Array
) -> dict[str, Callable[[], object]]:
    """Both prefills over these rows."""
    device = programs.Rows(
        *map(jnp.asarray, (rows.ids, rows.visual_index, rows.positions, rows.segment_ids))
    )
    last = rows.row_of * rows.ids.shape[1] + rows.start_of + rows.length_of - 1
    index, targets = jnp.asarray(last), jnp.ones(len(last), jnp.int32)
    integers = (rows.row_of, rows.start_of, *[rows.length_of] * 3)
    greedy = Sampling(
        temperature=jnp.zeros(len(last)),
        top_p=jnp.ones(len(last)),
        seed=jnp.zeros(len(last), jnp.uint32),
        stop_ids=jnp.full((len(last), MAX_STOP_IDS), -1, jnp.int32),
    )
    segments = programs.Segments(*map(jnp.asarray, integers), greedy)
    longest = int(rows.length_of.max())

    def read() -> jax.Array:
        partial = programs.hidden_before_last_mlp(
            *model, tokens, device, max_segment_length=longest
        )
        return programs.log_likelihoods(*model, partial, index, targets)

    page_size = tuning.current().page_size
    count = -(-rows.ids.size // page_size)
    pages = programs.empty_pages(*model, pages=count, page_size=page_size, dtype=tokens.dtype)
    places = jnp.arange(rows.ids.size, dtype=jnp.int32).reshape(rows.ids.shape)

    def prefill() -> jax.Array:
        nonlocal pages
        hidden, pages = programs.prefill(
            *model, pages, tokens, device, places, max_segment_length=longest
        )
        return programs.first_tokens(*model, hidden, segments)

    return {"read": read, "prefill": prefill}


def main(argv: Sequence[str] | None = None) -> None:
    """Times both arms in turns for every number of visual tokens."""
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_geometry_argument(parser)
    parser.add_argument("--visual", type=int, nargs="+", default=[576, 144, 40])
    parser.add_argument("--text_tokens", type=int, default=60)
    parser.add_argument("--row_length", type=int, default=640 if on_cpu else 1024)
    parser.add_argument("--rows", type=int, default=2 if on_cpu else 32)
    parser.add_argument("--repeats", type=int, default=5 if on_cpu else 20)
    add_rate_arguments(parser)
    arguments = parser.parse_args(argv)
    begin("prefill", __doc__, minutes=4)
    config, dtype = geometry(arguments.geometry), jnp.dtype(arguments.dtype)
    chip = peak_rates(arguments.chip, dtype)
    model = random_llava_for_inference(config, dtype)

    results = []
    for visual in arguments.visual:
        rows, number = packed_rows(
            visual, arguments.text_tokens, arguments.row_length, arguments.rows
        )
        tokens = jnp.ones((number, visual, config.vision.width), dtype)
        seconds = interleaved(arms(model, rows, tokens), arguments.repeats)
        workload = Workload(visual, arguments.text_tokens, batch=number)
        floors = floor_seconds(config, workload, chip)
        stages = operations(config, workload)
        flops = sum(step.flops for step in stages["projector"] + stages["prefill"])
        floor = floors["projector"] + floors["prefill"]
        for name, times in seconds.items():
            median = float(np.median(times))
            results.append(
                {
                    "arm": name,
                    "visual": visual,
                    "segments": number,
                    **quartiles_ms(times),
                    "segments_per_s": number / median,
                    "efficiency": float((rows.segment_ids > 0).mean()),
                    "floor_ms": 1e3 * floor,
                    "floor_share": floor / median,
                    "utilisation": flops / median / chip.flops,
                }
            )
    report("prefill", arguments, results, chip=chip)


if __name__ == "__main__":
    main()
