"""One engine for requests of several reductions: they share slots, pages and decoding."""

import functools
from collections.abc import Mapping

from prumerge_jax.engine.core import Core
from prumerge_jax.engine.encoding import interpolates
from prumerge_jax.engine.engine import Engine
from prumerge_jax.engine.request import Answer, Delta, Request
from prumerge_jax.engine.windows import Counters


class SharedEngine:
    """Requests that name their reduction, on one model.

    Only encoding and packing see the reduction. Rows of different reductions are prefilled in
    turns, and their sequences are decoded together.

    Attributes:
      engines: what plans each reduction's windows, by name.
      counters: what has been computed so far.
      core: the requests under way.
    """

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        """Prepares an engine; nothing is compiled yet.

        Args:
          engines: what would run the requests of each reduction alone.

        Raises:
          ValueError: they have other shapes, some weigh their tokens and others do not, or one
            drops tokens inside the decoder.
        """
        if any(engine.reduction.drops_tokens for engine in engines.values()):
            raise ValueError("engines that drop tokens inside the decoder cannot be shared")
        first, *others = engines.values()
        weighs = first.reduction.weighs_tokens
        for other in others:
            if other.shapes != first.shapes or other.reduction.weighs_tokens != weighs:
                raise ValueError("engines of different shapes or pages cannot share them")
        self.engines, self.counters = engines, Counters()
        self.core = Core(
            first.model,
            first.shapes,
            {
                name: functools.partial(engine.planner, self.counters)
                for name, engine in engines.items()
            },
            self.counters,
            key_bias=weighs,
        )

    def submit(self, request: Request) -> None:
        """Takes a request; see `Engine.submit`."""
        self.core.submit(request)

    def step(self) -> list[Delta | Answer]:
        """Dispatches more work, and returns what has come of earlier one; see `Engine.step`."""
        return self.core.step()

    def cancel(self, key: int) -> None:
        """Ends a request; see `Engine.cancel`."""
        self.core.cancel(key)

    def warm_up(self) -> None:
        """Compiles all jitted functions; see `Engine.warm_up`."""
        known: set[bool] = set()
        for engine in self.engines.values():
            form = interpolates(engine.model.config, engine.reduction)  # of rows
            engine.warm_up(rows=form not in known)
            known.add(form)
