"""Scoring: the log-likelihood of every query's continuation, read off packed rows."""

import collections
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prumerge_jax.data import packing
from prumerge_jax.data.tokens import IGNORE
from prumerge_jax.engine import programs
from prumerge_jax.engine.engine import Engine, Query, Result, Window
from prumerge_jax.models.llama import PartialHidden

HEAD_POSITIONS = 64
"""Positions that one call of the scoring head takes."""


def score(engine: Engine, queries: Iterable[Query]) -> Iterator[Result]:
    """The log-likelihood of every query's continuation. Results come in any order."""
    unread: collections.deque[_Scores] = collections.deque()
    for window in engine.windows(queries):
        yield from window.failed
        for rows in window.batches:
            partial = programs.hidden_before_last_mlp(
                engine.graphdef,
                engine.state,
                window.pool,
                engine.put_rows(rows),
                max_segment_length=engine.config.longest_prompt,
            )
            unread.append(_Scores(window, rows, _log_likelihoods(engine, partial, rows)))
            if len(unread) > 1:
                yield from unread.popleft().results()
    for scores in unread:
        yield from scores.results()


class _Scores(NamedTuple):
    """Log-likelihoods that have been dispatched and not been read."""

    window: Window
    rows: packing.Rows
    parts: list[jax.Array]

    def results(self) -> Iterator[Result]:
        """Sums them per query."""
        positions = np.flatnonzero(self.rows.targets.reshape(-1) != IGNORE)
        values = np.concatenate([np.zeros(0), *jax.device_get(self.parts)])[: len(positions)]
        begin = self.rows.row_of * self.rows.targets.shape[1] + self.rows.start_of
        first = np.searchsorted(positions, begin)
        last = np.searchsorted(positions, begin + self.rows.length_of)
        sums = [values[a:b].sum(dtype=np.float64) for a, b in zip(first, last, strict=True)]
        for index, total in zip(self.rows.requests, sums, strict=True):
            query = self.window.queries[index]
            visual_tokens = self.window.visual_tokens(index)
            yield Result(query.key, [], float(total), visual_tokens, query.text_tokens)


def _log_likelihoods(engine: Engine, partial: PartialHidden, rows: packing.Rows) -> list[jax.Array]:
    """log p of every target of the rows, in calls of `HEAD_POSITIONS` each."""
    flat = rows.targets.reshape(-1)
    positions = np.flatnonzero(flat != IGNORE)
    parts = []
    for start in range(0, len(positions), HEAD_POSITIONS):
        index = np.zeros(HEAD_POSITIONS, np.int32)
        part = positions[start : start + HEAD_POSITIONS]
        index[: len(part)] = part
        targets = np.maximum(flat[index], 0)  # the filler's target may be no token
        parts.append(
            programs.log_likelihoods(
                engine.graphdef, engine.state, partial, jnp.asarray(index), jnp.asarray(targets)
            )
        )
    return parts
