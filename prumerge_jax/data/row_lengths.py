"""Rows of packed sequences in few lengths: without the padding behind them, or with more of it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from prumerge_jax.data.packing import Rows
from prumerge_jax.data.runs import NO_SLOT, Taps
from prumerge_jax.data.tokens import IGNORE

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


def lengthened(rows: Rows, length: int) -> Rows:
    """The rows with padding up to this length."""
    more = length - rows.ids.shape[1]
    if more == 0:
        return rows
    padding = {"visual_index": NO_SLOT, "targets": IGNORE}

    def padded(values: np.ndarray, value: int) -> np.ndarray:
        widths = ((0, 0), (0, more), *[(0, 0)] * (values.ndim - 2))
        return np.pad(values, widths, constant_values=value)

    columns = {name: getattr(rows, name) for name in _BY_COLUMN}
    longer: dict[str, Any] = {
        name: None if each is None else padded(each, padding.get(name, 0))
        for name, each in columns.items()
    }
    if rows.taps is not None:
        longer["taps"] = Taps(padded(rows.taps.slots, NO_SLOT), padded(rows.taps.weight, 0))
    return dataclasses.replace(rows, **longer)
