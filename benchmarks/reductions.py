"""What each reduction costs in addition to the vision tower.

    python benchmarks/reductions.py

Every arm is one jitted step over the evidence of a batch, with what the method makes the tower
gather: the projection of all patches, the score over its layers. `over_tower` is its time over that
of the tower, `flops_over_tower` XLA's count of its operations over those of the cost model.
Methods inside the tower replace it: their arm is the whole tower less the plain one.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measuring import add_arguments, begin, interleaved, quartiles_ms, report
from models import add_geometry_argument, geometry, random_llava

from prumerge_jax import reductions
from prumerge_jax.cost import counts
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.vision_tower import VisionFeatures
from prumerge_jax.prumerge import VisualTokens

DEFAULT = (
    "prumerge prumerge:neighbours=8 prumerge+ prumerge-iterative cover cover:block=8 divprune "
    "divprune:features=hidden top dpp idselection evocut mmtok visionzip holov pact intower tome"
)
QUESTION_TOKENS = 64


def main(argv: Sequence[str] | None = None) -> None:
    """Times the methods in turns, and the tower."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_geometry_argument(parser)
    parser.set_defaults(geometry="7b")
    parser.add_argument("--reductions", default=DEFAULT)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tower_repeats", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    begin("reductions", __doc__, minutes=5)
    config, dtype = geometry(arguments.geometry), jnp.dtype(arguments.dtype)
    model = random_llava(tower_only(config), dtype)
    pixels = jax.random.normal(
        jax.random.key(0),
        (arguments.batch, config.vision.image_size, config.vision.image_size, 3),
        dtype,
    )
    plain = functools.partial(tower, *model, pixels, stages=None)
    tower_seconds = interleaved({"tower": plain}, arguments.tower_repeats)["tower"]
    whole = float(np.median(tower_seconds))

    parsed = reductions.parse_list(arguments.reductions)
    evidence = evidence_of(config, arguments.batch, dtype)
    arms: dict[str, Callable[[], Any]] = {}
    flops = {"tower": 1.0}
    tower_flops = counts.tower_flops(config.vision)
    for name, reduction in parsed.items():
        if "groups" in reduction.needs:
            stages = reduction.stages(config.vision.num_layers - 1, config.vision.num_patches)
            flops[name] = counts.staged_tower_flops(config.vision, stages) / tower_flops - 1
            continue
        arms[name] = functools.partial(step, evidence, projector_of(config, dtype), reduction)
        flops[name] = xla_flops(arms[name]) / tower_flops / arguments.batch
    seconds = {"tower": tower_seconds, **interleaved(arms, arguments.repeats)}
    for name, reduction in parsed.items():
        if "groups" in reduction.needs:
            stages = reduction.stages(config.vision.num_layers - 1, config.vision.num_patches)
            arm = functools.partial(tower, *model, pixels, stages=stages)
            total = interleaved({name: arm}, arguments.tower_repeats)[name]
            seconds[name] = [second - whole for second in total]
    results = [
        {
            "arm": name,
            **quartiles_ms(seconds[name]),
            "over_tower": float(np.median(seconds[name])) / whole,
            "flops_over_tower": flops[name],
        }
        for name in ("tower", *parsed)
    ]
    report("reductions", arguments, results)


def tower_only(config: LlavaConfig) -> LlavaConfig:
    """The same tower with the smallest of decoders."""
    small = dataclasses.replace(config.text, num_layers=1, mlp_width=8, vocab_size=8)
    return dataclasses.replace(config, text=small)


@functools.partial(jax.jit, static_argnames=("graphdef", "stages"))
def tower(
    graphdef: nnx.GraphDef,
    state: nnx.State,
    pixels: jax.Array,
    *,
    stages: tuple[reductions.Stage, ...] | None,
) -> VisionFeatures:
    """[B, S, S, 3] normalised pixels to features."""
    return nnx.merge(graphdef, state).vision(pixels, stages=stages)


def evidence_of(config: LlavaConfig, batch: int, dtype: jnp.dtype) -> reductions.Evidence:
    """Random evidence with neighbours that are alike, as patches are."""
    vision, patches = config.vision, config.vision.num_patches
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=(batch, *shape)).astype(np.float32)

    mixture = np.exp(2 * normal(patches, 7))
    mixture /= mixture.sum(-1, keepdims=True)
    hidden = mixture @ normal(7, vision.width) + 0.1 * normal(patches, vision.width)
    heads = jax.nn.softmax(2 * normal(vision.num_heads, patches + 1), axis=-1)[..., 1:]
    asked = jnp.ones((batch, QUESTION_TOKENS), bool)
    return reductions.Evidence(
        jnp.asarray(hidden, dtype),
        jnp.asarray(hidden),
        jax.nn.softmax(2 * normal(patches + 1), axis=-1)[:, 1:],
        cls=jnp.asarray(normal(vision.width), dtype),
        head_attention=heads,
        feature_keys=jnp.asarray(hidden),
        question=(jnp.asarray(normal(QUESTION_TOKENS, config.text.width), dtype), asked),
    )


def projector_of(config: LlavaConfig, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Random weights of a projector of two layers."""
    key, width = jax.random.key(1), config.text.width
    return (
        jax.random.normal(key, (config.vision.width, width), dtype) * 0.01,
        jax.random.normal(key, (width, width), dtype) * 0.01,
    )


@functools.partial(jax.jit, static_argnames="reduction")
def step(
    evidence: reductions.Evidence,
    projector: tuple[jax.Array, jax.Array],
    reduction: reductions.Reduction,
) -> VisualTokens:
    """What the method computes once the tower has run, and what it watched in it."""
    more: dict[str, jax.Array] = {}
    if "projected" in reduction.needs:
        first, second = projector
        more["projected"] = jax.nn.gelu(evidence.hidden @ first, approximate=False) @ second
    if "watched" in reduction.needs:
        score = jnp.zeros(evidence.attention.shape, jnp.float32)
        layers = 11  # the upper half of 23
        for _ in range(layers):
            after = evidence.hidden * (1 + score[..., None]) + evidence.keys[:, ::-1]
            score = reduction.watch(score, evidence.hidden, after, jnp.float32(1))
        more["watched"] = score
    return reductions.reduce(dataclasses.replace(evidence, **more), reduction)


def xla_flops(arm: functools.partial[VisualTokens]) -> float:
    """XLA's count of the operations of an arm; a loop's body counts once."""
    analysis = arm.func.lower(*arm.args).compile().cost_analysis()  # type: ignore[attr-defined]
    return float((analysis or {}).get("flops", 0.0))


if __name__ == "__main__":
    main()
