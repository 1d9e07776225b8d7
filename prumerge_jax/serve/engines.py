"""The engines of a server: one for all reductions whose keys and values look alike."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from prumerge_jax.engine.build import Draft
from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.shapes import EngineConfig, EngineShapes, serving_sizes
from prumerge_jax.engine.shared import SharedEngine
from prumerge_jax.llava import Llava
from prumerge_jax.models import tuning
from prumerge_jax.reductions import Reduction
from prumerge_jax.serve.config import ServeConfig

SHORTEST_ROW, LONGEST_ROW = 128, 1024
"""Tokens of the shortest row, since a lone question should not compute a row for a dozen; and of
the longest, unless a prompt has more."""
MOST_TOKENS = 1 << 17
"""Of a prompt, in any model."""


def engine_config(config: ServeConfig) -> EngineConfig:
    """The shapes that requests want which come one by one."""
    growth = tuning.current().row_growth
    lengths = [SHORTEST_ROW]
    while lengths[-1] < MOST_TOKENS:
        lengths.append(growth * lengths[-1])
    return EngineConfig(
        slots=config.slots,
        decode_steps_per_call=config.decode_steps_per_call,
        short_rows=tuple(lengths),
        defaults=serving_sizes(),
    )


def lane_of(reduction: Reduction) -> str:
    """The engine that a reduction's requests run in: weights of tokens are stored with keys."""
    return "weighted" if reduction.weighs_tokens else "plain"


def lanes(reductions: Mapping[str, Reduction]) -> dict[str, dict[str, Reduction]]:
    """The reductions of every engine, by spelling."""
    found: dict[str, dict[str, Reduction]] = {}
    for spelling, reduction in reductions.items():
        found.setdefault(lane_of(reduction), {})[spelling] = reduction
    return found


def shared_engine(
    llava: Llava,
    reductions: Mapping[str, Reduction],
    config: ServeConfig,
    longest: Callable[[Reduction], Sequence[Draft]],
    most_crops: int,
) -> SharedEngine:
    """One engine for all of these reductions, everything compiled.

    Args:
      llava: the model.
      reductions: by spelling.
      config: of the server.
      longest: as many of the longest requests of a reduction as there are slots.
      most_crops: of the images of a request.
    """
    alone = {
        spelling: llava.engine(
            reduction,
            longest(reduction),
            max_new_tokens=config.max_new_tokens,
            position_ids=config.position_ids,
        )
        for spelling, reduction in reductions.items()
    }
    shapes = _common_shapes(list(alone.values()), most_crops)
    engine = SharedEngine(
        {
            spelling: Engine(each.model, each.reduction, shapes, position_ids=each.position_ids)
            for spelling, each in alone.items()
        }
    )
    engine.warm_up()
    return engine


def _common_shapes(engines: Sequence[Engine], most_crops: int) -> EngineShapes:
    """Shapes that every one of these engines can run with."""
    shapes = engines[0].shapes

    def most(name: str) -> int:
        return max(getattr(engine.shapes, name) for engine in engines)

    capacities = (engine.encoder.slots(engine.reduction.uncapped()) for engine in engines)
    longest, whole_batches = most("longest_prompt"), -(-most_crops // shapes.batch_size)
    return dataclasses.replace(
        shapes,
        window_size=max(shapes.window_size, whole_batches * shapes.batch_size),
        row_length=max(longest, min(most("row_length"), LONGEST_ROW)),
        longest_prompt=longest,
        cache_length=most("cache_length"),
        pages=most("pool_pages"),
        pool_capacity=max(capacities),
    )
