"""Runs: what takes the place of one placeholder of a prompt.

The pool is the array of the encoded visual tokens, its slots on one axis.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

NO_SLOT = -1
"""In place of a slot of the pool: a text token or padding."""

TAPS = 4
"""Slots of the pool that a token may be interpolated from."""


class Taps(NamedTuple):
    """Slots that each of n tokens is the weighted sum of, after the projector.

    Attributes:
      slots: int32 [n, TAPS], the first one as the token's in `Run`; -1 for none.
      weight: float32 [n, TAPS].
    """

    slots: np.ndarray
    weight: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What takes the place of one placeholder: the visual tokens of an image, in order.

    Attributes:
      index: int32 [n], the slot of the pool of each token, or `NEWLINE`.
      offset: int32 [n], the position of each in the image without reduction, from 0; only
        `position_ids` of `original` reads it.
      span: positions of the whole image without reduction.
      taps: what tokens are interpolated from; None where each is that of its slot.
    """

    index: np.ndarray
    offset: np.ndarray
    span: int
    taps: Taps | None = None

    def __post_init__(self) -> None:
        if self.index.ndim != 1 or self.offset.shape != self.index.shape:
            raise ValueError(
                f"index {self.index.shape} and offset {self.offset.shape}; expected [n] both"
            )
        if self.taps is not None and self.taps.slots.shape != (len(self), TAPS):
            raise ValueError(f"taps {self.taps.slots.shape}; expected {[len(self), TAPS]}")

    @property
    def as_taps(self) -> Taps:
        """The taps; without any, each token is one times that of its slot."""
        if self.taps is not None:
            return self.taps
        others = np.full((len(self), TAPS - 1), NO_SLOT, np.int32)
        weight = np.zeros((len(self), TAPS), np.float32)
        weight[:, 0] = 1
        return Taps(np.concatenate([self.index[:, None], others], axis=1), weight)

    def __len__(self) -> int:
        return self.index.size
