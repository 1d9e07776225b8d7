"""End-to-end scoring and answering through the batch engine: reduced against full tokens.

    python benchmarks/scoring.py
    python benchmarks/scoring.py --output_tokens 8 --means 40 144
    python benchmarks/scoring.py --questions_per_image 18
    python benchmarks/scoring.py --crops 5
    python benchmarks/scoring.py --frames 8 --image_size 224 --means 32

Every request is a question of `--text_tokens` about an image (uint8, resized), which comes after 35
of them. With one output token the engine scores a continuation of one token, with more it decodes
greedily. Tower, PruMerge step, packing, prefill and decoding all run; but random weights say
nothing about how many tokens an image needs, so the counts are drawn from a lognormal distribution
and put in place of the measured ones before the window is planned. `full` is the same engine with
all patches, `transformers` is `LlavaForConditionalGeneration` in PyTorch at its best batch size.
With several crops, or frames of a video, counts are drawn for each (`visual_per_crop`). With
several questions per image every arm of the engine runs twice: with what they share computed once
(`shared`), and without, on `--apart_requests` of them, whose rate does not depend on how many they
are. `--data` splits the engine's rows over this many devices. A CPU is taken as two devices,
so that each half of its cores has different rows (XLA runs the small products of attention on one
core per device), at the price of a copy of the weights for each.

Columns: `efficiency` is real over computed row tokens; `speedup` is against `full` that shares as
the arm does, and `flop_ratio` what the FLOPs allow; `sharing_speedup` is against the same arm that
shares nothing; `floor_share` is questions per second over the cost model's floor at `--floor_batch`
questions (which counts the complete last layer, where scoring computes most of it for
the scored positions alone); `memory_gb` the peak during the arm, weights of all arms included;
`compilations` counts functions compiled in the timed part.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from drawn import DrawnCounts, drawn_counts, random_requests
from flax import nnx
from jax.sharding import Mesh
from measuring import (
    Compilations,
    add_rate_arguments,
    begin,
    peak_memory_gb,
    peak_rates,
    report,
    reset_peak_memory,
)
from models import add_geometry_argument, geometry, layout_of, random_llava_for_inference

from prumerge_jax import reductions
from prumerge_jax.cost import Chip, Workload, images_per_second, operations
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.engine.encoding import PlacedModel
from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.request import Request
from prumerge_jax.engine.shapes import EngineConfig, fit
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.sharding.mesh import make_mesh, replicated, use_mesh

CPU_DEVICES = 2
USUAL_SHARE = 0.4  # of the peak, all stages together
FULL, PEER = "full", "transformers"
SHARED_IMAGES = {FULL: 2, "prumerge+": 6, "prumerge": 7}
APART_QUESTIONS = {FULL: 4, "prumerge+": 12, "prumerge": 19}
"""What fills rows on a CPU: images with 18 questions each, and questions that share nothing."""


@dataclasses.dataclass(frozen=True, eq=False)
class Arm:
    """One way to run the requests.

    Attributes:
      kind: its reduction, with the mean count where several arms have the same, or `transformers`.
      shared: whether questions share what is in front of them.
      run: all requests once.
      counts: visual tokens of every request and crop, [requests, crops].
      efficiency: real over computed row tokens of what has run so far.
      questions_per_image: that share their image.
    """

    kind: str
    shared: bool
    run: Callable[[], Any]
    counts: np.ndarray
    efficiency: Callable[[], float]
    questions_per_image: int = 1

    @property
    def tokens(self) -> np.ndarray:
        """Visual tokens of every request."""
        return self.counts.sum(axis=1)

    @property
    def name(self) -> str:
        """What it is called while it runs."""
        return f"{self.kind}, shared" if self.shared else self.kind


def engine_arm(
    model: tuple[nnx.GraphDef, nnx.State],
    config: LlavaConfig,
    dtype: jnp.dtype,
    kind: str,
    counts: np.ndarray,
    requests: list[Request],
    config_of_shapes: EngineConfig,
    mesh: Mesh | None,
    questions_per_image: int = 1,
) -> Arm:
    """The engine with these counts; what `config_of_shapes` leaves open is fitted."""
    decoding = not len(requests[0].continuation)
    placed = PlacedModel(*model, config, dtype, mesh)
    chosen = reductions.parse(kind.split()[0])
    fitted = fit(
        config_of_shapes,
        chosen,
        config.vision.num_patches,
        [request.opening for request in requests],
        max_new_tokens=requests[0].sampling.max_new_tokens if decoding else 0,
        max_positions=config.text.max_positions,
        shards=placed.shards,
    )
    engine = Engine(placed, chosen, fitted)
    engine.encoder = encoder = DrawnCounts(placed, fitted)
    encoder.counts = counts

    def run() -> None:
        with use_mesh(mesh):
            answers = list(engine.generate(requests) if decoding else engine.score(requests))
        if failed := [answer for answer in answers if answer.error is not None]:
            raise ValueError(f"request {failed[0].key}: {failed[0].error}")

    shared = fitted.share_prefixes and questions_per_image > 1
    return Arm(
        kind,
        shared,
        run,
        counts[[request.key for request in requests]],
        lambda: engine.counters.real_tokens / engine.counters.row_tokens,
        questions_per_image if shared else 1,
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
    return Arm(PEER, False, run, np.full((whole, 1), config.vision.num_patches), lambda: 1.0), note


def workload(arm: Arm, arguments: argparse.Namespace, batch: int = 1) -> Workload:
    """What an arm computes, for the cost model."""
    return Workload(
        float(arm.tokens.mean()),
        arguments.text_tokens,
        batch,
        arguments.output_tokens,
        questions_per_image=arm.questions_per_image,
        crops_per_image=arm.counts.shape[1],
    )


def flops_per_question(config: LlavaConfig, arm: Arm, arguments: argparse.Namespace) -> float:
    """FLOPs of all stages, by the cost model."""
    stages = operations(config, workload(arm, arguments)).values()
    return sum(operation.flops for stage in stages for operation in stage)


def engine_arms(
    model: tuple[nnx.GraphDef, nnx.State],
    config: LlavaConfig,
    dtype: jnp.dtype,
    mesh: Mesh | None,
    arguments: argparse.Namespace,
) -> list[Arm]:
    """`full` and the reductions, with several questions per image each with sharing and without."""
    patches, asked = config.vision.num_patches, arguments.questions_per_image
    layout = layout_of(config, arguments.crops, arguments.frames)
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
    arms: list[Arm] = []
    for mean in (float(patches), *arguments.means):
        reduction = FULL if mean == patches else "prumerge" if mean <= patches // 8 else "prumerge+"
        number = arguments.full_requests if reduction == FULL else arguments.requests
        requests = random_requests(
            config,
            number or asked * SHARED_IMAGES[reduction],
            arguments.text_tokens,
            arguments.output_tokens,
            asked,
            layout,
        )
        counts = np.full((len(requests), layout.num_crops), patches)
        if reduction != FULL:
            most = reductions.parse(reduction).capacity_for(patches)
            # Questions about one image have its count.
            drawn = drawn_counts(counts[::asked].size, mean, most, seed=1)
            counts = np.repeat(drawn.reshape(-1, layout.num_crops), asked, axis=0)
        kind = f"{reduction} {mean:g}" if any(a.kind == reduction for a in arms) else reduction
        for share in (True, False) if asked > 1 else (False,):
            of_kind = full_shapes if reduction == FULL else shapes
            of_kind = dataclasses.replace(of_kind, share_prefixes=share)
            some = requests
            if asked > 1 and not share:  # from several images
                some = requests[::3][: arguments.apart_requests or APART_QUESTIONS[reduction]]
            arms.append(engine_arm(model, config, dtype, kind, counts, some, of_kind, mesh, asked))
    return arms


def timed(
    config: LlavaConfig, arms: Sequence[Arm], chip: Chip, arguments: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, float], int]:
    """Runs the arms in turns, the first time untimed, and says so.

    Returns:
      Seconds of each arm's timed runs, the peak of memory in GB of its first, and the number of
      compilations in the timed part.
    """
    floor = sum(flops_per_question(config, a, arguments) * len(a.counts) for a in arms) / chip.flops
    rounds = 1 + arguments.repeats
    print(
        f"{len(arms)} arms in {rounds} rounds, the first untimed; a round computes for about "
        f"{floor / USUAL_SHARE:.0f} s, and the first compiles for a minute or two",
        flush=True,
    )
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    memory = {}
    compilations = Compilations()
    for number in range(rounds):
        for arm in arms:
            reset_peak_memory()
            start = time.perf_counter()
            arm.run()
            took = time.perf_counter() - start
            print(
                f"  round {number}: {arm.name}, {len(arm.counts)} questions, {took:.1f} s",
                flush=True,
            )
            if number:
                seconds[arm.name].append(took)
            else:
                memory[arm.name] = peak_memory_gb()
        if not number:
            compilations = Compilations()
    return seconds, memory, compilations.count


def main(argv: Sequence[str] | None = None) -> None:
    """Builds the arms, times them in turns and reports."""
    arguments = parse(argv)
    begin("scoring", __doc__, minutes=5)
    config, dtype = geometry(arguments.geometry), jnp.dtype(arguments.dtype)
    if arguments.image_size:
        vision = dataclasses.replace(config.vision, image_size=arguments.image_size)
        config = dataclasses.replace(config, vision=vision)
    chip = peak_rates(arguments.chip, dtype)
    graphdef, state = random_llava_for_inference(config, dtype)
    mesh = make_mesh(data=arguments.data) if arguments.data > 1 else None
    model = graphdef, state if mesh is None else jax.device_put(state, replicated(mesh))
    arms = engine_arms(model, config, dtype, mesh, arguments)
    notes = []
    if arguments.peer:
        print("transformers: looking for its best batch size", flush=True)
        fewer = random_requests(
            config, arguments.full_requests, arguments.text_tokens, arguments.output_tokens
        )
        arm, note = peer_arm(config, fewer, arguments)
        arms.append(arm)
        notes.append(note)
    seconds, memory, compilations = timed(config, arms, chip, arguments)
    results = summary(config, arms, seconds, memory, chip, arguments)
    notes.append(f"compilations in the timed part: {compilations}")
    report("scoring", arguments, results, chip=chip, notes=notes)


def summary(
    config: LlavaConfig,
    arms: Sequence[Arm],
    seconds: dict[str, list[float]],
    memory: dict[str, float],
    chip: Chip,
    arguments: argparse.Namespace,
) -> list[dict[str, Any]]:
    """One line per arm."""
    rates = {arm.name: len(arm.counts) / float(np.median(seconds[arm.name])) for arm in arms}
    full = {arm.shared: arm for arm in arms if arm.kind == FULL}
    results = []
    for arm in arms:
        rate, flops = rates[arm.name], flops_per_question(config, arm, arguments)
        full_flops = flops_per_question(config, full[arm.shared], arguments)
        floor = images_per_second(config, workload(arm, arguments, arguments.floor_batch), chip)
        speedup = rate / rates[full[arm.shared].name]
        results.append(
            {
                "arm": arm.kind,
                "shared": arm.shared,
                "output_tokens": arguments.output_tokens,
                "questions_per_s": rate,
                "visual_mean": float(arm.tokens.mean()),
                "visual_per_crop": float(arm.counts.mean()),
                **{f"p{p}": float(np.percentile(arm.tokens, p)) for p in (5, 50, 95)},
                "max": int(arm.tokens.max()),
                "efficiency": arm.efficiency(),
                "speedup": speedup,
                "flop_ratio": full_flops / flops,
                "flop_ratio_share": speedup * flops / full_flops,
                "sharing_speedup": rate / rates[arm.kind] if arm.kind in rates else 1.0,
                "floor_questions_per_s": floor,
                "floor_share": rate / floor,
                "memory_gb": memory[arm.name],
            }
        )
    return results


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; what is None by default depends on the machine and on the questions per image."""
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_geometry_argument(parser)
    parser.add_argument("--output_tokens", type=int, default=1)
    parser.add_argument("--text_tokens", type=int, default=60)
    parser.add_argument("--questions_per_image", type=int, default=1)
    parser.add_argument("--crops", type=int, default=1, help="of every image")
    parser.add_argument("--frames", type=int, default=0, help="of a video in place of every image")
    parser.add_argument("--image_size", type=int, help="side of the tower's images")
    parser.add_argument("--means", type=float, nargs="*", help="visual tokens")
    parser.add_argument("--requests", type=int, help="default: what fills rows")
    parser.add_argument("--full_requests", type=int, help="of the arm `full`")
    parser.add_argument("--apart_requests", type=int, help="of arms that share nothing")
    parser.add_argument("--batch_size", type=int, help="of encoding")
    parser.add_argument("--window", type=int, default=256 if on_cpu else 1024)
    parser.add_argument("--full_window", type=int, default=256)
    parser.add_argument("--row_length", type=int, help="default: fitted to the requests")
    parser.add_argument("--full_row_length", type=int, help="of the arm `full`; default: fitted")
    parser.add_argument("--rows", type=int, help="rows per prefill")
    parser.add_argument("--full_rows", type=int)
    parser.add_argument("--data", type=int, help="devices that share the rows")
    parser.add_argument("--slots", type=int, default=16 if on_cpu else 256)
    parser.add_argument("--repeats", type=int, default=2 if on_cpu else 10)
    parser.add_argument("--floor_batch", type=int, default=32)
    parser.add_argument(
        "--peer", action=argparse.BooleanOptionalAction, help="default: with one question per image"
    )
    parser.add_argument(
        "--peer_batches", type=int, nargs="+", default=[1, 2] if on_cpu else [8, 16, 32, 64]
    )
    parser.add_argument("--compile_peer", action="store_true", help="torch.compile its forward")
    add_rate_arguments(parser)
    arguments = parser.parse_args(argv)
    several = arguments.questions_per_image > 1
    crops = arguments.frames or arguments.crops
    chosen = {
        "means": [144.0, 40.0] if several else [40.0],
        "requests": (0 if several else 60 // crops) if on_cpu else 4096,
        "full_requests": (0 if several else max(6 // crops, 2)) if on_cpu else 1024,
        "apart_requests": 0 if on_cpu else 1024,
        "batch_size": (2 if several else 8) if on_cpu else 64,
        "rows": (1 if several else 2) if on_cpu else 32,
        "full_rows": (1 if several else 2) if on_cpu else 32,
        # Few images do not spread over devices.
        "data": 1 if several or not on_cpu else CPU_DEVICES,
        "peer": not several and crops == 1,
    }
    for name, value in chosen.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", CPU_DEVICES)
    main()
