"""Scoring: log-likelihoods of continuations, or all logits, read off packed rows."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from prumerge_jax.data import packing
from prumerge_jax.data.tokens import IGNORE
from prumerge_jax.engine import programs
from prumerge_jax.engine.encoding import PlacedModel
from prumerge_jax.engine.request import Answer, SequenceLogits
from prumerge_jax.engine.windows import Window
from prumerge_jax.models.llama import PartialHidden
from prumerge_jax.reductions import Drops

HEAD_POSITIONS = 64
"""Positions that one call of the scoring head takes."""


class Scores(NamedTuple):
    """Log-likelihoods of a batch of rows, dispatched and not yet read."""

    window: Window
    rows: packing.Rows
    parts: list[jax.Array]

    def answers(self) -> Iterator[Answer]:
        """Waits for them and sums them per request."""
        positions = np.flatnonzero(self.rows.targets.reshape(-1) != IGNORE)
        values = np.concatenate([np.zeros(0), *jax.device_get(self.parts)])[: len(positions)]
        begin = self.rows.row_of * self.rows.targets.shape[1] + self.rows.start_of
        first = np.searchsorted(positions, begin)
        last = np.searchsorted(positions, begin + self.rows.length_of)
        sums = [values[a:b].sum(dtype=np.float64) for a, b in zip(first, last, strict=True)]
        for index, total in zip(self.rows.requests, sums, strict=True):
            key, usage = self.window.requests[index].key, self.window.usage(index, new_tokens=0)
            yield Answer(key, (), float(total), "stop", usage)


def dispatch_scores(
    model: PlacedModel,
    window: Window,
    rows: packing.Rows,
    *,
    longest_prompt: int,
    drops: Drops | None = None,
) -> Scores:
    """Runs packed rows and the scoring head at every target, in calls of `HEAD_POSITIONS` each."""
    partial = _partial_hidden(model, window, rows, longest_prompt, drops)
    return Scores(window, rows, _log_likelihoods(model, partial, rows))


def sequence_logits(
    model: PlacedModel,
    window: Window,
    rows: packing.Rows,
    *,
    longest_prompt: int,
    drops: Drops | None = None,
) -> Iterator[SequenceLogits]:
    """The logits of every sequence in packed rows, visual tokens and newlines in place."""
    partial = _partial_hidden(model, window, rows, longest_prompt, drops)
    for place, request in enumerate(rows.requests.tolist()):
        positions = rows.positions_of(place)
        parts = []
        for start in range(0, len(positions), HEAD_POSITIONS):
            index = np.full(HEAD_POSITIONS, positions[-1], np.int32)
            part = positions[start : start + HEAD_POSITIONS]
            index[: len(part)] = part
            at = jnp.asarray(index)
            parts.append(programs.logits_at(model.graphdef, model.state, partial, at))
        values = np.concatenate(jax.device_get(parts))[: len(positions)]
        yield SequenceLogits(window.requests[request].key, values)


def _partial_hidden(
    model: PlacedModel,
    window: Window,
    rows: packing.Rows,
    longest_prompt: int,
    drops: Drops | None,
) -> PartialHidden:
    return programs.hidden_before_last_mlp(
        model.graphdef,
        model.state,
        window.pool,
        model.put_rows(rows, drops),
        max_segment_length=longest_prompt,
        drops=drops,
    )


def _log_likelihoods(
    model: PlacedModel, partial: PartialHidden, rows: packing.Rows
) -> list[jax.Array]:
    """log p of every target of the rows."""
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
                model.graphdef, model.state, partial, jnp.asarray(index), jnp.asarray(targets)
            )
        )
    return parts
