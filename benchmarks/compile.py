"""How long a deep decoder takes to trace and to compile.

    python benchmarks/compile.py

The layers are narrow: compilation does not depend on the width. `train` is the gradient of the
next-token loss in low-rank adapters, activations recomputed.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from measuring import add_arguments, begin, progress, report

from prumerge_jax.models.config import TextConfig
from prumerge_jax.models.layers import AdapterConfig, LoRAParam
from prumerge_jax.models.llama import Llama

ROWS, LENGTH = 2, 256


def programs(layers: int, width: int) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Functions to compile, each with its abstract arguments."""
    text = TextConfig(
        vocab_size=1000, width=width, mlp_width=2 * width, num_layers=layers, num_heads=4,
        num_kv_heads=4, head_dim=width // 4,
    )  # fmt: skip
    adapter = AdapterConfig(rank=8, alpha=16.0, dropout=0.05)
    with nnx.use_eager_sharding(False):
        model = nnx.eval_shape(lambda: Llama(text, adapter=adapter, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    trained, frozen = nnx.split_state(state, LoRAParam, nnx.Param)
    x = jax.ShapeDtypeStruct((ROWS, LENGTH, width), jnp.float32)
    integers = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)

    def forward(trained: nnx.State, frozen: nnx.State, x: jax.Array, at: jax.Array) -> jax.Array:
        decoder = nnx.merge(graphdef, trained, frozen)
        return decoder.logits(decoder(x, at, jnp.ones_like(at)))

    def loss(trained: nnx.State, frozen: nnx.State, x: jax.Array, at: jax.Array) -> jax.Array:
        decoder = nnx.merge(graphdef, trained, frozen)
        hidden = decoder(x, at, jnp.ones_like(at), remat="full", dropout_key=jax.random.key(0))
        return -jax.nn.log_softmax(decoder.logits(hidden))[..., 0].sum()

    shapes = (trained, frozen, x, integers)
    return {"forward": (forward, shapes), "train": (jax.value_and_grad(loss), shapes)}


def trace_and_compile(function: Callable[..., Any], shapes: tuple[Any, ...]) -> tuple[float, float]:
    """Seconds of tracing and lowering, and of compiling."""
    jax.clear_caches()
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*shapes)
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def main(argv: Sequence[str] | None = None) -> None:
    """Compiles in turns and reports medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    is_cached = jax.config.values["jax_compilation_cache_dir"] is not None
    if is_cached and jax.config.values["jax_enable_compilation_cache"]:
        parser.error("a persistent compilation cache is set: unset JAX_COMPILATION_CACHE_DIR")
    begin("compile", __doc__, minutes=2)
    to_compile = programs(arguments.layers, arguments.width)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in to_compile}
    for _ in range(arguments.repeats):
        for name, (function, shapes) in to_compile.items():
            seconds[name].append(trace_and_compile(function, shapes))
            progress(f"{name}: {sum(seconds[name][-1]):.0f} s")
    results = []
    for name, pairs in seconds.items():
        trace, compilation = np.median(pairs, axis=0)
        total = np.sum(pairs, axis=1)
        results.append(
            {
                "program": name,
                "layers": arguments.layers,
                "trace_s": float(trace),
                "compile_s": float(compilation),
                "total_s": float(np.median(total)),
                "total_s_max": float(total.max()),
            }
        )
    report("compile", arguments, results)


if __name__ == "__main__":
    main()
