"""Rows of packed sequences in few lengths: without the padding behind them, or with more of it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from prumerge_jax.data.packing import Rows
from prumerge_jax.data.runs import NO_SLOT, Taps
from prumerge_jax.data.tokens import IGNORE

_PADDING = {
    "ids": 0,
    "visual_index": NO_SLOT,
    "positions": 0,
    "segment_ids": 0,
    "targets": IGNORE,
    "branch_ids": 0,
}


def cut(rows: Rows, lengths: Sequence[int]) -> Rows:
    """The rows as long as the first of these ascending lengths that holds all of their tokens."""
    used = 1 + int(np.flatnonzero(rows.segment_ids.any(axis=0)).max(initial=0))
    length = next(each for each in lengths if each >= used)
    return _with_columns(rows, lambda values, _: values[:, :length])


def lengthened(rows: Rows, length: int) -> Rows:
    """The rows with padding up to this length."""
    more = length - rows.ids.shape[1]

    def padded(values: np.ndarray, padding: int) -> np.ndarray:
        widths = ((0, 0), (0, more), *[(0, 0)] * (values.ndim - 2))
        return np.pad(values, widths, constant_values=padding)

    return _with_columns(rows, padded)


def _with_columns(rows: Rows, change: Callable[[np.ndarray, int], np.ndarray]) -> Rows:
    """The rows with `change` of every array [rows, L, ...] and what pads it."""
    columns = {name: (getattr(rows, name), padding) for name, padding in _PADDING.items()}
    changed: dict[str, Any] = {
        name: None if values is None else change(values, padding)
        for name, (values, padding) in columns.items()
    }
    if rows.taps is not None:
        slots, weight = rows.taps
        changed["taps"] = Taps(change(slots, NO_SLOT), change(weight, 0))
    return dataclasses.replace(rows, **changed)
