"""Tokens that leave the decoder after some of its layers, visual ones as a rule.

A schedule says how many stay from which layer on; who ranks them is the prompt. Here nothing gets
faster by it: all tokens are computed and the dropped ones masked, which gives the answers of the
method (`models/token_drops.py`).
"""

from typing import Literal, NamedTuple

import numpy as np

RECYCLED = (3, 10)
"""SparseVLM's share of the dropped tokens that is clustered, and tokens per cluster: 3 in 10 and 10
each."""


class Drops(NamedTuple):
    """Which tokens the decoder's layers see; static under `jax.jit`.

    Attributes:
      layers: from each of these layers on fewer tokens are left, ascending.
      shares: how many from there on, as a share of those of the sequence.
      raters: whose attention ranks them: the `last` token of the prompt, or the words of its `text`
        that belong to the image.
      ranked_by: whose attention it is, that of the `previous` layer or that of the `coming` one,
        computed before it.
      renumbered: whether the tokens that are left get consecutive positions.
      recycled: whether the best of the dropped tokens come back as means of clusters.
      of: which tokens leave, the `visual` ones, or those of the prompt's `text` but the last.
    """

    layers: tuple[int, ...]
    shares: tuple[float, ...]
    raters: Literal["last", "text"] = "last"
    ranked_by: Literal["previous", "coming"] = "coming"
    renumbered: bool = False
    recycled: bool = False
    of: Literal["visual", "text"] = "visual"

    def share_from(self, depth: int) -> np.ndarray:
        """The share that is newly left from every layer on, [depth + 1] float32; 1 is all."""
        shares = np.ones(depth + 1, np.float32)
        for layer, share in zip(self.layers, self.shares, strict=True):
            shares[layer] = share
        return shares

    def layer_average(self, tokens: float, depth: int) -> float:
        """Mean over the decoder's layers of the visual tokens that they see of `tokens`."""
        if self.of == "text":
            return tokens
        total, left = 0.0, tokens
        for share in self.share_from(depth)[:depth]:
            if share < 1:
                kept = min(float(count_of(tokens, share)), left)
                left = kept + (clusters_of(left - kept) if self.recycled else 0)
            total += left
        return total / depth


def count_of(tokens: float, share: float) -> float:
    """How many tokens a share of them is, rounded down."""
    return np.floor(tokens * share + ROUNDING)


def clusters_of(dropped: float) -> float:
    """How many tokens come back of so many dropped ones."""
    share, size = RECYCLED
    return np.ceil(np.floor(dropped * share / 10) / size)


ROUNDING = 1e-3
"""What a product with a share in float32 may lack of a whole number."""
