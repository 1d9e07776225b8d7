"""Rows of packed sequences without the padding behind them, in few lengths."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from prumerge_jax.data.packing import Rows
from prumerge_jax.data.runs import Taps

_BY_COLUMN = ("ids", "visual_index", "positions", "segment_ids", "targets", "branch_ids")


def cut(rows: Rows, lengths: Sequence[int]) -> Rows:
    """The rows as long as the first of these ascending lengths that holds all of their tokens."""
    used = 1 + int(np.flatnonzero(rows.segment_ids.any(axis=0)).max(initial=0))
    length = next(each for each in lengths if each >= used)
    columns = {name: getattr(rows, name) for name in _BY_COLUMN}
    shorter: dict[str, Any] = {
        name: None if each is None else each[:, :length] for name, each in columns.items()
    }
    if rows.taps is not None:
        shorter["taps"] = Taps(*(each[:, :length] for each in rows.taps))
    return dataclasses.replace(rows, **shorter)
