"""What the benchmarks run: sizes by name, random weights, attention with outliers."""

import argparse
import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from prumerge_jax.data.anyres import Window
from prumerge_jax.data.layout import Layout
from prumerge_jax.families import published
from prumerge_jax.models.config import LlavaConfig, TextConfig, VisionConfig
from prumerge_jax.models.layers import AdapterConfig
from prumerge_jax.models.llava import LlavaModel, inference_layout
from prumerge_jax.models.quantisation import QuantParam

GEOMETRIES = {
    "tiny": published("tiny"),
    # For CPUs: 576 patches, a decoder of 300 million parameters, and a tower that costs 3 % of it
    # per image at full tokens, as CLIP-L costs 4 % of Vicuna-7B.
    "mid": LlavaConfig(
        vision=VisionConfig(width=256, mlp_width=1024, num_layers=8, num_heads=4),
        text=TextConfig(
            width=1024, mlp_width=2816, num_layers=18, num_heads=16, num_kv_heads=16, head_dim=64
        ),
    ),
    "7b": published("llava-1.5-7b"),
}


def add_geometry_argument(parser: argparse.ArgumentParser) -> None:
    """The flag that selects the sizes."""
    parser.add_argument(
        "--geometry",
        default="mid" if jax.default_backend() == "cpu" else "7b",
        choices=GEOMETRIES,
        help="sizes of the model (default here: %(default)s)",
    )


def geometry(name: str) -> LlavaConfig:
    """The sizes of that name; no token ends a sequence, so that all have the asked-for length."""
    return dataclasses.replace(GEOMETRIES[name], eos_token_ids=())


def layout_of(config: LlavaConfig, crops: int, frames: int) -> Layout:
    """What the crops of an image are, the whole image and a square of tiles, or frames.

    No edge is cut off and no newline added: without reduction all patches of all crops are tokens.
    """
    grid = config.vision.grid
    if frames:
        return Layout(grid, frames=frames, pooled=grid)
    tiles = math.isqrt(crops - 1)
    if tiles**2 != crops - 1:
        raise ValueError(f"--crops is {crops}; expected 1 and a square, such as 5")
    side = tiles * grid
    return Layout(grid, (tiles, tiles), Window(0, side, 0, side), (side, side))


def random_llava(
    config: LlavaConfig, dtype: jnp.dtype, adapter: AdapterConfig | None = None
) -> tuple[nnx.GraphDef, nnx.State]:
    """A `LlavaModel` with random weights."""
    return random_weights(lambda rngs: LlavaModel(config, adapter=adapter, rngs=rngs), dtype)


def random_llava_for_inference(
    config: LlavaConfig, dtype: jnp.dtype
) -> tuple[nnx.GraphDef, nnx.State]:
    """`random_llava` as `Llava.load` lays out its weights."""
    return inference_layout(*random_llava(config, dtype))


def random_weights(
    make: Callable[[nnx.Rngs], nnx.Module], dtype: jnp.dtype
) -> tuple[nnx.GraphDef, nnx.State]:
    """The structure of what `make` builds and random weights, created on the device in `dtype`."""

    def create() -> nnx.State:
        key = jax.random.key(0, impl="unsafe_rbg")  # compiles several times faster
        weights = nnx.to_flat_state(nnx.state(make(nnx.Rngs(key))))
        return nnx.from_flat_state(
            {
                path: weight
                if isinstance(weight, QuantParam)
                else weight.replace(weight[...].astype(dtype))
                for path, weight in weights
            }
        )

    with nnx.use_eager_sharding(False):
        graphdef, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
        return graphdef, jax.jit(create)()


def outlier_attention(batch: int, patches: int, kept: int, seed: int) -> np.ndarray:
    """[B, N] float32 attention of which `kept` entries per image are outliers.

    The others are uniform, a distribution without outliers; the tail above them is heavy.
    """
    rng = np.random.default_rng(seed)
    attention = rng.uniform(1, 2, (batch, patches))
    for row in attention:
        row[rng.choice(patches, kept, replace=False)] = 4 + rng.exponential(8, kept)
    return (0.9 * attention / attention.sum(-1, keepdims=True)).astype(np.float32)
