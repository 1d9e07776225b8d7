"""Who asks in packed rows: the last token of the prompt that a token belongs to."""

import numpy as np

from prumerge_jax.data.packing import Rows
from prumerge_jax.data.tokens import IGNORE


def asking_columns(rows: Rows) -> np.ndarray:
    """Of every token the column of the last one of its prompt, int32 [rows, L]; -1 at padding.

    A prompt ends with the token that predicts the first target, or with the request.

    Args:
      rows: rows whose requests share no prefixes.
    """
    asking = np.full(rows.ids.shape, -1, np.int32)
    for row, start, length in zip(rows.row_of, rows.start_of, rows.length_of, strict=True):
        predicts = np.flatnonzero(rows.targets[row, start : start + length] != IGNORE)
        last = predicts[0] if predicts.size else length - 1
        asking[row, start : start + length] = start + last
    return asking
