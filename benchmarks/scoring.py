"""End-to-end scoring and answering through the batch engine: reduced against full tokens.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --output_tokens 8 --means 40 144

Every request is one image (uint8, resized) with `--text_tokens` of text. With one output token the
engine scores a continuation of one token, with more it decodes greedily. Tower, PruMerge step,
packing, prefill and decoding all run; but random weights say nothing about how many tokens an image
needs, so the counts are drawn from a lognormal distribution and put in place of the measured ones
before the window is planned. `full` is the same engine with all patches, `transformers` is
`LlavaForConditionalGeneration` in PyTorch at its best batch size. `--data` splits the engine's rows
over this many devices. A CPU is taken as two devices, so that each half of its cores has different
rows (XLA runs the small products of attention on one core per device), at the price of a copy of
the weights for each.

Columns: `efficiency` is real over computed row tokens; `speedup` is against `full`, and
`flop_ratio` what the FLOPs allow; `floor_share` is images per second over the cost model's floor at
`--floor_batch` images (which counts the complete last layer, where scoring computes most of it for
the scored positions alone); `memory_gb` the peak during the arm, weights of all arms included;
`compilations` counts functions compiled in the timed part.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from measuring import (
    Compilations,
    add_rate_arguments,
    interleaved,
    peak_memory_gb,
    peak_rates,
    report,
    reset_peak_memory,
)
from models import add_geometry_argument, geometry, random_llava_for_inference

from prumerge_jax import reductions
from prumerge_jax.cost import Chip, Workload, images_per_second, operations
from prumerge_jax.data.layout import Layout
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.engine.encoding import EncodedImages, Encoder, Encoding, PlacedModel
from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.request import ImageInput, Request, SamplingParams
from prumerge_jax.engine.shapes import EngineConfig, fit, most_visual_tokens
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.sharding.mesh import make_mesh, replicated, use_mesh

CPU_DEVICES = 2
SIGMA = 0.45  # of the logarithm of the counts
FULL, PEER = "full", "transformers"


class DrawnCounts(Encoder):
    """An encoder that takes the number of visual tokens of request i to be `counts[i]`."""

    counts: np.ndarray

    def measure(self, encoding: Encoding) -> EncodedImages:
        """The encoder's images with other lengths; every jitted function runs as it does there."""
        images = super().measure(encoding)
        lengths = images.lengths.copy()
        places = encoding.places
        for request, ((number,),) in zip(places.requests, places.numbers, strict=True):
            batch, row = divmod(number, len(lengths))
            lengths[row, batch] = self.counts[request.key]
        return images._replace(lengths=lengths)


@dataclasses.dataclass(frozen=True, eq=False)
class Arm:
    """One way to run the requests.

    Attributes:
      warm_up: as many requests as run every jitted function and fill the memory.
      run: all requests once.
      counts: visual tokens of every request.
      efficiency: real over computed row tokens of what has run so far.
    """

    warm_up: Callable[[], Any]
    run: Callable[[], Any]
    counts: np.ndarray
    efficiency: Callable[[], float]


def drawn_counts(number: int, mean: float, most: int, seed: int) -> np.ndarray:
    """Lognormal counts of this mean, [number] int32, from 1 to `most`."""
    draws = np.random.default_rng(seed).lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, number)
    return np.clip(np.rint(draws), 1, most).astype(np.int32)


def random_requests(
    config: LlavaConfig, number: int, text_tokens: int, output_tokens: int
) -> list[Request]:
    """Random images with random text around them."""
    rng = np.random.default_rng(0)
    side, layout = config.vision.image_size, Layout(config.vision.grid)
    requests = []
    for key in range(number):
        text = rng.integers(3, config.text.vocab_size, text_tokens).astype(np.int32)
        request = Request(
            key,
            np.insert(text, 1, IMAGE_TOKEN),
            (ImageInput(rng.integers(0, 256, (1, side, side, 3), np.uint8), layout),),
            continuation=text[: int(output_tokens == 1)],
            sampling=SamplingParams(max_new_tokens=output_tokens),
        )
        requests.append(request)
    return requests


def engine_arm(
    model: tuple[nnx.GraphDef, nnx.State],
    config: LlavaConfig,
    dtype: jnp.dtype,
    reduction: reductions.Reduction,
    counts: np.ndarray,
    requests: list[Request],
    config_of_shapes: EngineConfig,
    mesh: Mesh | None,
) -> Arm:
    """The engine with these counts; what `config_of_shapes` leaves open is fitted."""
    text_tokens = [request.text_tokens + len(request.continuation) for request in requests]
    decoding = not len(requests[0].continuation)
    placed = PlacedModel(*model, config, dtype, mesh)
    fitted = fit(
        config_of_shapes,
        reduction,
        most_visual_tokens(reduction, [Layout(config.vision.grid)]),
        np.array(text_tokens),
        max_new_tokens=requests[0].sampling.max_new_tokens if decoding else 0,
        max_positions=config.text.max_positions,
        shards=placed.shards,
    )
    engine = Engine(placed, reduction, fitted)
    engine.encoder = encoder = DrawnCounts(placed, fitted)
    encoder.counts = counts

    def run(some: list[Request]) -> None:
        with use_mesh(mesh):
            answers = list(engine.generate(some) if decoding else engine.score(some))
        if failed := [answer for answer in answers if answer.error is not None]:
            raise ValueError(f"request {failed[0].key}: {failed[0].error}")

    return Arm(
        # The second window is encoded while the first runs.
        lambda: run(requests[: 2 * fitted.window_size]),
        lambda: run(requests),
        counts,
        lambda: engine.counters.real_tokens / engine.counters.row_tokens,
    )


def peer_arm(
    config: LlavaConfig, requests: list[Request], arguments: argparse.Namespace
) -> tuple[Arm, str]:
    """transformers at its best batch size, and a note about which that is."""
    import torch_llava

    model = torch_llava.random_model(config, arguments.dtype, compiled=arguments.compile_peer)
    images = np.concatenate([request.images[0].crops for request in requests])
    prompt = requests[0].token_ids[requests[0].token_ids != IMAGE_TOKEN]
    sizes = [size for size in arguments.peer_batches if size <= len(images)]
    rates = torch_llava.best_batch_size(
        model, config, images, prompt, arguments.output_tokens, sizes
    )
    best = max(rates, key=lambda size: rates[size])
    whole = len(images) // best * best
    batches = [
        torch_llava.batch(model, config, images[i : i + best], prompt, arguments.output_tokens)
        for i in range(0, whole, best)
    ]

    def run() -> None:
        for batch in batches:
            batch.run()

    listed = ", ".join(f"{size}: {rate:.3g}" for size, rate in rates.items())
    note = f"transformers, images/s by batch size: {listed}; timed at {best}"
    return Arm(run, run, np.full(whole, config.vision.num_patches), lambda: 1.0), note


def flops_per_image(config: LlavaConfig, visual: float, arguments: argparse.Namespace) -> float:
    """FLOPs per image of all stages, by the cost model."""
    workload = Workload(visual, arguments.text_tokens, output_tokens=arguments.output_tokens)
    stages = operations(config, workload).values()
    return sum(operation.flops for stage in stages for operation in stage)


def main(argv: Sequence[str] | None = None) -> None:
    """Builds the arms, times them in turns and reports."""
    arguments = parse(argv)
    config, dtype = geometry(arguments.geometry), jnp.dtype(arguments.dtype)
    chip = peak_rates(arguments.chip, dtype)
    graphdef, state = random_llava_for_inference(config, dtype)
    mesh = make_mesh(data=arguments.data) if arguments.data > 1 else None
    model = graphdef, state if mesh is None else jax.device_put(state, replicated(mesh))
    patches = config.vision.num_patches
    requests = random_requests(
        config, arguments.requests, arguments.text_tokens, arguments.output_tokens
    )
    fewer = requests[: arguments.full_requests]

    shapes = EngineConfig(
        batch_size=arguments.batch_size,
        window_size=arguments.window,
        row_length=arguments.row_length,
        prefill_rows=arguments.rows,
        slots=arguments.slots,
    )
    full_shapes = dataclasses.replace(
        shapes,
        row_length=arguments.full_row_length,
        prefill_rows=arguments.full_rows,
        window_size=arguments.full_window,
    )
    arms = {
        FULL: engine_arm(
            model, config, dtype, reductions.parse("full"),
            np.full(len(fewer), patches), fewer, full_shapes, mesh,
        )
    }  # fmt: skip
    for mean in arguments.means:
        reduction = reductions.parse("prumerge" if mean <= patches // 8 else "prumerge+")
        most = reduction.capacity_for(patches)
        counts = drawn_counts(len(requests), mean, most, seed=1)
        arms[f"prumerge {mean:g}"] = engine_arm(
            model, config, dtype, reduction, counts, requests, shapes, mesh
        )
    notes = []
    if arguments.peer:
        arms[PEER], note = peer_arm(config, fewer, arguments)
        notes.append(note)

    memory = {}
    for name, arm in arms.items():
        reset_peak_memory()
        arm.warm_up()
        memory[name] = peak_memory_gb()
    compilations = Compilations()
    seconds = interleaved({name: arm.run for name, arm in arms.items()}, arguments.repeats)
    results = summary(config, arms, seconds, memory, chip, arguments)
    notes.append(f"compilations in the timed part: {compilations.count}")
    report("scoring", arguments, results, chip=chip, notes=notes)


def summary(
    config: LlavaConfig,
    arms: dict[str, Arm],
    seconds: dict[str, list[float]],
    memory: dict[str, float],
    chip: Chip,
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """One line per arm."""
    rates = {name: len(arm.counts) / float(np.median(seconds[name])) for name, arm in arms.items()}
    full_flops = flops_per_image(config, config.vision.num_patches, arguments)
    results = []
    for name, arm in arms.items():
        mean = float(arm.counts.mean())
        flops = flops_per_image(config, mean, arguments)
        floor = images_per_second(
            config,
            Workload(mean, arguments.text_tokens, arguments.floor_batch, arguments.output_tokens),
            chip,
        )
        speedup = rates[name] / rates[FULL]
        results.append(
            {
                "arm": name,
                "output_tokens": arguments.output_tokens,
                "images_per_s": rates[name],
                "visual_mean": mean,
                **{f"p{p}": float(np.percentile(arm.counts, p)) for p in (5, 50, 95)},
                "max": int(arm.counts.max()),
                "efficiency": arm.efficiency(),
                "speedup": speedup,
                "flop_ratio": full_flops / flops,
                "flop_ratio_share": speedup * flops / full_flops,
                "floor_images_per_s": floor,
                "floor_share": rates[name] / floor,
                "memory_gb": memory[name],
            }
        )
    return results


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_geometry_argument(parser)
    parser.add_argument("--output_tokens", type=int, default=1)
    parser.add_argument("--text_tokens", type=int, default=60)
    parser.add_argument("--means", type=float, nargs="*", default=[40.0], help="visual tokens")
    parser.add_argument("--requests", type=int, default=1024 if on_cpu else 4096)
    parser.add_argument("--full_requests", type=int, default=32 if on_cpu else 1024)
    parser.add_argument("--batch_size", type=int, default=8 if on_cpu else 64, help="of encoding")
    parser.add_argument("--window", type=int, default=256 if on_cpu else 1024)
    parser.add_argument("--full_window", type=int, default=16 if on_cpu else 256)
    parser.add_argument("--row_length", type=int, help="default: fitted to the requests")
    parser.add_argument("--full_row_length", type=int, help="of the arm `full`; default: fitted")
    parser.add_argument("--rows", type=int, default=4 if on_cpu else 32, help="rows per prefill")
    parser.add_argument("--full_rows", type=int, default=8 if on_cpu else 32)
    parser.add_argument(
        "--data",
        type=int,
        default=CPU_DEVICES if on_cpu else 1,
        help="devices that share the rows (default here: %(default)s)",
    )
    parser.add_argument("--slots", type=int, default=16 if on_cpu else 256)
    parser.add_argument("--repeats", type=int, default=3 if on_cpu else 10)
    parser.add_argument("--floor_batch", type=int, default=32)
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--peer_batches", type=int, nargs="+", default=[1, 2, 4] if on_cpu else [8, 16, 32, 64]
    )
    parser.add_argument("--compile_peer", action="store_true", help="torch.compile its forward")
    add_rate_arguments(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", CPU_DEVICES)
    main()
