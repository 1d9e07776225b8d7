"""Greedy decoding with kernels of fewer bits, against none.

    python benchmarks/quantised_decode.py
    python benchmarks/quantised_decode.py --formats int8 int4 --slots 1 8

Every arm decodes `--steps` tokens in every slot in one dispatch, always from the same lengths, with
the shapes and pages of `decode.py`. `speedup` is the time of the unquantised model with as many
slots over the arm's, `decoder_mb` what its blocks and head take.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from decode import Decoding, shapes_of
from flax import nnx
from measuring import add_arguments, begin, interleaved, quartiles_ms, report
from models import add_geometry_argument, geometry, random_weights

from prumerge_jax.cost import Bits, counts
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.models.llava import LlavaModel, inference_layout
from prumerge_jax.models.quantisation import FORMATS

REDUCTION = "prumerge"
PLAIN = "none"


def quantised_llava(
    config: LlavaConfig, dtype: jnp.dtype, name: str
) -> tuple[nnx.GraphDef, nnx.State]:
    """A model with random weights, its kernels in this format, as `Llava.load` lays them out."""
    form = FORMATS.get(name)
    model = random_weights(lambda rngs: LlavaModel(config, quantize=form, rngs=rngs), dtype)
    return inference_layout(*model)


def main(argv: Sequence[str] | None = None) -> None:
    """Times every format and number of slots in turns."""
    on_cpu = jax.default_backend() == "cpu"
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_geometry_argument(parser)
    parser.add_argument("--formats", nargs="+", default=["int8"], choices=sorted(FORMATS))
    parser.add_argument("--slots", type=int, nargs="+", default=[1])
    parser.add_argument("--text_tokens", type=int, default=60, help="tokens of every prompt")
    parser.add_argument("--new_tokens", type=int, default=32, help="tokens of every answer")
    parser.add_argument("--page_size", type=int, help="tokens per page (default: the platform's)")
    parser.add_argument("--steps", type=int, default=8, help="steps per run")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--dtype", default="float32" if on_cpu else "bfloat16")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    begin("quantised_decode", __doc__, minutes=2)
    config, dtype = geometry(arguments.geometry), jnp.dtype(arguments.dtype)
    prompt = arguments.text_tokens + 40 * config.vision.num_patches // 576 + 1
    arms: dict[tuple[str, int], Decoding] = {}
    for name in (PLAIN, *arguments.formats):
        model = quantised_llava(config, dtype, name)
        for slots in arguments.slots:
            shapes = shapes_of(REDUCTION, config, slots, arguments)
            lengths = np.full(slots, prompt)
            arms[name, slots] = Decoding(model, shapes, lengths, arguments.steps, dtype)
            jax.block_until_ready(arms[name, slots]())
    seconds = interleaved(arms, arguments.repeats)
    results: list[dict[str, Any]] = []
    for (name, slots), times in seconds.items():
        steps = [total / arguments.steps for total in times]
        plain = float(np.median(seconds[PLAIN, slots])) / arguments.steps
        sizes = counts.parameters(config)
        kernels = 8 * dtype.itemsize if name == PLAIN else Bits.of(name).kernels
        results.append(
            {
                "format": name,
                "slots": slots,
                **quartiles_ms(steps),
                "tokens_per_s": slots / float(np.median(steps)),
                "speedup": plain / float(np.median(steps)),
                "decoder_mb": (sizes.blocks * kernels / 8 + sizes.head * dtype.itemsize) / 1e6,
            }
        )
    report("quantised_decode", arguments, results)


if __name__ == "__main__":
    main()
