"""LoRA training on packed rows, the frozen tower included.

    python benchmarks/lora_training.py

A step encodes the images, packs as many equal samples (`--visual` and `--text_tokens` tokens, half
of the text to be learnt) as the rows hold, and updates adapters and projector with AdamW. Counts
are fixed: those of random weights would mean nothing. `utilisation_4n` counts four FLOPs per frozen
decoder weight and real token (no weight gradient, no recomputation) over time and peak;
`utilisation` adds tower, attention (causal), adapters and projector. `speedup` is in samples per
second against the first count.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measuring import add_rate_arguments, begin, interleaved, peak_rates, quartiles_ms, report
from models import add_geometry_argument, geometry, random_llava
from prefill import packed_rows

from prumerge_jax import reductions, sharding
from prumerge_jax.cost import training_flops
from prumerge_jax.data.tokens import IGNORE
from prumerge_jax.engine import programs
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.layers import AdapterConfig
from prumerge_jax.models.remat import REMAT
from prumerge_jax.training.batches import RowBatch
from prumerge_jax.training.objectives.next_token import next_token_loss
from prumerge_jax.training.optimizer import OptimizerConfig, make_optimizer
from prumerge_jax.training.step import TrainState, TrainStep, state_shardings
from prumerge_jax.training.weights import Weights, llava_module, trained_paths

LEARNING_RATES = (("*lora_*", 2e-4), ("projector.*", 2e-5))


class Trainer:
    """A model, its optimizer and its compiled step on one device."""

    def __init__(
        self, config: LlavaConfig, adapter: AdapterConfig, dtype: jnp.dtype, remat: str
    ) -> None:
        self.config, self.dtype = config, dtype
        self.model = random_llava(config, dtype, adapter)
        module = llava_module(config, adapter)
        weights = {
            ".".join(map(str, path)): variable[...]
            for path, variable in nnx.to_flat_state(self.model[1])
        }
        rates = trained_paths(weights, LEARNING_RATES)
        trained = {path: weights[path].astype(jnp.float32) for path in rates}
        self.frozen = {path: weights[path] for path in weights if path not in rates}

        def loss(weights: Weights, batch: RowBatch, key: jax.Array) -> tuple[jax.Array, jax.Array]:
            return next_token_loss(
                module.merge(weights),
                batch,
                dropout_key=key,
                remat=remat,
            )

        mesh = sharding.make_mesh()
        optimizer = make_optimizer(OptimizerConfig(), 10_000, rates)
        shapes = {path: module.shapes()[path] for path in rates}
        placed = state_shardings(optimizer, shapes, module.shardings(mesh), mesh)
        self.step = TrainStep(loss, optimizer, seed=0, shardings=placed)
        self.state: TrainState = self.step.init(trained)

    def arm(self, visual: int, text: int, length: int, rows: int) -> tuple[Callable[[], Any], int]:
        """One training step from pixels to new weights, and its number of samples."""
        plan, samples = packed_rows(visual, text, length, rows)
        vision = self.config.vision
        pixels = np.random.default_rng(0).integers(
            0, 256, (samples, vision.image_size, vision.image_size, 3), np.uint8
        )
        reduction = reductions.parse("full")
        if visual < vision.num_patches:
            reduction = reductions.parse(f"prumerge:capacity={visual}")
        learnt = (plan.visual_index < 0) & (plan.positions > visual + text // 2)
        targets = np.where(learnt, plan.ids, IGNORE)
        placed = dataclasses.replace(plan, targets=targets)
        names = ("ids", "visual_index", "positions", "segment_ids", "targets")
        fields = {name: jnp.asarray(getattr(placed, name)) for name in names}
        raw = jnp.asarray(pixels)

        def run() -> Any:
            encoded = programs.encode(
                *self.model,
                raw,
                reduction=reduction,
                dtype=self.dtype,
            )
            batch = RowBatch(**fields, visual_tokens=encoded.tokens)
            self.state, metrics = self.step(self.state, self.frozen, [batch], step=0)
            return self.state, metrics

        return run, samples


def main(argv: Sequence[str] | None = None) -> None:
    """Times steps of all counts in turns."""
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_geometry_argument(parser)
    parser.add_argument("--visual", type=int, nargs="+", default=[576, 144, 40])
    parser.add_argument("--text_tokens", type=int, default=60)
    parser.add_argument("--row_length", type=int, default=640 if on_cpu else 2048)
    parser.add_argument("--rows", type=int, default=1 if on_cpu else 8)
    parser.add_argument("--rank", type=int, default=8 if on_cpu else 128)
    parser.add_argument("--remat", default="full", choices=REMAT)
    parser.add_argument("--repeats", type=int, default=3 if on_cpu else 20)
    add_rate_arguments(parser)
    arguments = parser.parse_args(argv)
    begin("lora_training", __doc__, minutes=4)
    config, dtype = geometry(arguments.geometry), jnp.dtype(arguments.dtype)
    chip = peak_rates(arguments.chip, dtype)
    adapter = AdapterConfig(arguments.rank, alpha=2.0 * arguments.rank)
    trainer = Trainer(config, adapter, dtype, arguments.remat)
    text = arguments.text_tokens

    arms, samples = {}, {}
    for visual in arguments.visual:
        arms[visual], samples[visual] = trainer.arm(
            visual, text, arguments.row_length, arguments.rows
        )
    seconds = interleaved(arms, arguments.repeats)
    rates = {visual: samples[visual] / float(np.median(seconds[visual])) for visual in arms}
    results = []
    for visual, times in seconds.items():
        flops = training_flops(config, visual, text, arguments.rank)
        floor = sum(flops.values()) / chip.flops * samples[visual]
        median = float(np.median(times))
        results.append(
            {
                "visual": visual,
                "samples": samples[visual],
                **quartiles_ms(times),
                "samples_per_s": rates[visual],
                "speedup": rates[visual] / rates[arguments.visual[0]],
                "efficiency": samples[visual]
                * (visual + text)
                / (arguments.row_length * arguments.rows),
                "floor_ms": 1e3 * floor,
                "utilisation_4n": flops["base"] * rates[visual] / chip.flops,
                "utilisation": floor / median,
            }
        )
    report("lora_training", arguments, results, chip=chip)


if __name__ == "__main__":
    main()
