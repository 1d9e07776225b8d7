"""Sequences of text with images, and all of their tokens on one axis.

A placeholder stands for the visual tokens of an image; which these are is given as a `Run`, see
`visual_layout`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from prumerge_jax.data.runs import NO_SLOT, TAPS, Run, Taps
from prumerge_jax.data.tokens import IGNORE, IMAGE_TOKEN
from prumerge_jax.messages import quoted
from prumerge_jax.models.config import NEWLINE

PositionIds = Literal["compact", "original"]


def check_position_ids(position_ids: str) -> None:
    """Raises ValueError for other values than those of `PositionIds`."""
    if position_ids not in get_args(PositionIds):
        raise ValueError(
            f"position_ids is {quoted(position_ids)}; expected 'compact' or 'original'"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One sequence of text with its images.

    Attributes:
      token_ids: int32 [T], one `IMAGE_TOKEN` per image at the place of its visual tokens.
      runs: what each placeholder stands for, in their order.
      labels: int32 [T], the token itself where it is to be predicted and `IGNORE` elsewhere; None
        predicts nothing.
    """

    token_ids: np.ndarray
    runs: tuple[Run, ...] = ()
    labels: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.token_ids.ndim != 1 or not self.token_ids.size:
            raise ValueError(
                f"token_ids has shape {self.token_ids.shape}; expected one dimension, not empty"
            )
        placeholders = int(np.count_nonzero(self.token_ids == IMAGE_TOKEN))
        if placeholders != len(self.runs):
            raise ValueError(
                f"token_ids holds {placeholders} image placeholders ({IMAGE_TOKEN}) for "
                f"{len(self.runs)} images; each image needs exactly one"
            )
        if self.labels is not None and self.labels.shape != self.token_ids.shape:
            raise ValueError(
                f"labels has shape {self.labels.shape}, token_ids {self.token_ids.shape}; "
                "they must be equal"
            )


def sequence_lengths(requests: Sequence[Request]) -> np.ndarray:
    """Tokens of each request once visual tokens have replaced the placeholders, int64 [n]."""
    return np.array(
        [r.token_ids.size - len(r.runs) + sum(len(run) for run in r.runs) for r in requests],
        np.int64,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """All tokens of all requests on one axis; `starts` and `lengths` [n] cut it into requests."""

    ids: np.ndarray
    visual_index: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def beginnings(self, requests: np.ndarray) -> tuple[list[np.ndarray], list[int]]:
        """What `find_groups` compares of requests [n], and how much of each may be a prefix.

        The last position, and those that predict something, are the request's own: what is read
        there differs from request to request.
        """
        # One number says which token it is, text or visual, and at which position.
        names = np.where(
            self.visual_index == NO_SLOT, self.ids, NO_SLOT + NEWLINE - self.visual_index
        )
        names = names * (1 + self.positions.max(initial=0)) + self.positions
        cuts = [slice(start, start + n) for start, n in zip(self.starts, self.lengths, strict=True)]
        predicts = [np.flatnonzero(self.targets[cuts[index]] != IGNORE) for index in requests]
        shareable = [
            int(where[0]) if where.size else int(self.lengths[index]) - 1
            for index, where in zip(requests, predicts, strict=True)
        ]
        return [names[cuts[index]] for index in requests], shareable


def concatenated(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Integer arrays on one axis, int64; none give an empty one."""
    return np.concatenate([np.zeros(0, np.int64), *arrays])


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (lengths[0] numbers), starts[1], ... on one axis."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(lengths.sum())


def expand(requests: Sequence[Request], position_ids: PositionIds) -> Tokens:
    """Puts every placeholder's run in its place, for all requests at once."""
    check_position_ids(position_ids)
    if not requests:
        none = np.zeros(0, np.int64)
        return Tokens(none, none, none, none, none, none)
    text = concatenated([r.token_ids for r in requests])
    labels = np.concatenate(
        [np.full(r.token_ids.size, IGNORE) if r.labels is None else r.labels for r in requests]
    )
    text_lengths = np.array([r.token_ids.size for r in requests])
    text_starts = np.cumsum(text_lengths) - text_lengths
    placeholder = text == IMAGE_TOKEN
    runs = [run for request in requests for run in request.runs]
    width = np.ones(text.size, np.int64)
    width[placeholder] = [len(run) for run in runs]

    # From here on one entry per packed token: `origin` is the text position that it came from.
    origin = np.repeat(np.arange(text.size), width)
    visual = placeholder[origin]
    visual_index = np.full(origin.size, NO_SLOT)
    visual_index[visual] = concatenated([run.index for run in runs])
    advance, offset = width, ranges(np.zeros_like(width), width)
    if position_ids == "original":
        offset[visual] = concatenated([run.offset for run in runs])
        advance = np.ones_like(width)
        advance[placeholder] = [run.span for run in runs]
    begin = np.cumsum(advance) - advance
    begin -= np.repeat(begin[text_starts], text_lengths)

    lengths = np.add.reduceat(width, text_starts)
    starts = np.cumsum(lengths) - lengths
    targets = np.full(origin.size, IGNORE)
    targets[:-1] = np.where(visual, IGNORE, labels[origin])[1:]
    targets[starts + lengths - 1] = IGNORE
    return Tokens(
        ids=np.where(visual, 0, text[origin]),
        visual_index=visual_index,
        positions=begin[origin] + offset,
        targets=targets,
        starts=starts,
        lengths=lengths,
    )


def expand_taps(requests: Sequence[Request], tokens: Tokens) -> Taps:
    """Taps of all tokens of all requests, none at text."""
    count = tokens.visual_index.size
    index, weight = np.full((count, TAPS), NO_SLOT), np.zeros((count, TAPS), np.float32)
    taps = [run.as_taps for request in requests for run in request.runs]
    if taps:
        visual = tokens.visual_index != NO_SLOT
        index[visual] = np.concatenate([each.slots for each in taps])
        weight[visual] = np.concatenate([each.weight for each in taps])
    return Taps(index, weight)
