"""Filling rows of one length with sequences of many, and with groups of sequences that share a
prefix (`prefixes`).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Group:
    """Sequences of which a row computes the common beginning once.

    Attributes:
      prefix: tokens of that beginning; 0 where there is none.
      members: the sequences, as indices of the planner's input.
    """

    prefix: int
    members: tuple[int, ...]

    def own(self, lengths: np.ndarray) -> list[int]:
        """Tokens of each member behind the prefix, of those with these lengths [n]."""
        return (lengths[list(self.members)] - self.prefix).tolist()

    def size(self, lengths: np.ndarray) -> int:
        """Tokens of the group in a row."""
        return self.prefix + sum(self.own(lengths))


def fill_rows_with_groups(
    groups: Sequence[Group],
    lengths: np.ndarray,
    row_length: int,
    *,
    carried_over: int = 0,
) -> list[list[Group]]:
    """Rows of groups; one that does not fit where there is room goes on in another row, which
    computes its prefix again.

    Whole groups come first, the largest that fits, and what is left of a row takes the part of
    another that fills it best. Where no sequences share anything this is `fill_rows`.

    Args:
      groups: every sequence is in one.
      lengths: int64 [n], tokens of each sequence, the prefix included.
      row_length: room in a row.
      carried_over: this many of the first groups come into the first rows, before all others.

    Returns:
      For each row the groups, or parts of groups, in their order.

    Raises:
      ValueError: a sequence has no token or more than `row_length`.
    """
    check_fits(lengths, row_length)
    if all(len(group.members) == 1 for group in groups):
        alone = np.array([group.members[0] for group in groups], np.int64)
        rows = fill_rows(lengths[alone], row_length, carried_over=carried_over)
        return [[groups[place] for place in row] for row in rows]
    queues = [
        sorted(part, key=lambda group: -group.size(lengths))
        for part in (groups[:carried_over], groups[carried_over:])
    ]
    rows_of_groups: list[list[Group]] = []
    while any(queues):
        row: list[Group] = []
        free = row_length
        for waiting in queues:
            while (piece := _take(waiting, lengths, free)) is not None:
                row.append(piece)
                free -= piece.size(lengths)
        rows_of_groups.append(row)
    return rows_of_groups


def _take(waiting: list[Group], lengths: np.ndarray, room: int) -> Group | None:
    """Takes out of `waiting`, largest first, the next group or part of one; None: nothing fits."""
    for place, group in enumerate(waiting):
        if group.size(lengths) <= room:
            return waiting.pop(place)
    best: tuple[int, int, Group] | None = None
    for place, group in enumerate(waiting):
        part = _fullest_part(group, lengths, room)
        if part is not None and (best is None or part.size(lengths) > best[0]):
            best = part.size(lengths), place, part
    if best is None:
        return None
    _, place, part = best
    whole = waiting.pop(place)
    rest = Group(whole.prefix, tuple(m for m in whole.members if m not in part.members))
    at = next((i for i, g in enumerate(waiting) if g.size(lengths) < rest.size(lengths)), None)
    waiting.insert(len(waiting) if at is None else at, rest)
    return part


def _fullest_part(group: Group, lengths: np.ndarray, room: int) -> Group | None:
    """The members that fill the room best, the longest that fits among them."""
    own = group.own(lengths)
    free = room - group.prefix
    order = sorted(range(len(own)), key=lambda place: -own[place])
    longest = next((place for place in order if own[place] <= free), None)
    if longest is None:
        return None
    others = [place for place in order if place != longest]
    chosen = _best_subset([own[place] for place in others], free - own[longest])
    places = sorted([longest, *(others[place] for place in chosen)])
    return Group(group.prefix, tuple(group.members[place] for place in places))


def fill_rows(
    lengths: Sequence[int] | np.ndarray, row_length: int, *, carried_over: int = 0
) -> list[list[int]]:
    """Bin packing, row after row: the largest unplaced sequence and the subset that fills the row
    best with it.

    This is the minimum bin slack heuristic (Gupta and Ho 1999). First-fit-decreasing leaves half of
    a short sequence over in every row, here 3 %; this one next to nothing before the last rows.
    No unplaced sequence fits in what a row leaves over, so any two rows hold more than one has room
    for. Deterministic: of equal lengths the first in the input comes first.

    Args:
      lengths: the lengths to be packed.
      row_length: room in a row.
      carried_over: this many of the first lengths are packed first-fit-decreasing before all
        others, into the first rows.

    Returns:
      For each row the indices into `lengths`, in the order in which they are placed in the row.

    Raises:
      ValueError: a length is smaller than 1 or larger than `row_length`.
    """
    lengths = np.asarray(lengths, np.int64)
    check_fits(lengths, row_length)
    size = lengths.tolist()
    order = np.argsort(-lengths, kind="stable").tolist()
    first = [index for index in order if index < carried_over]
    waiting = [index for index in order if index >= carried_over]
    rows: list[list[int]] = []
    while first or waiting:
        row: list[int] = []
        free = row_length
        for index in first:
            if size[index] <= free:
                row.append(index)
                free -= size[index]
        longest = next((index for index in waiting if size[index] <= free), None)
        if longest is not None:
            others = [index for index in waiting if index != longest]
            chosen = _best_subset([size[index] for index in others], free - size[longest])
            row += [longest, *(others[place] for place in chosen)]
        rows.append(row)
        first = [index for index in first if index not in row]
        waiting = [index for index in waiting if index not in row]
    return rows


def _best_subset(lengths: Sequence[int], room: int) -> list[int]:
    """The subset of the lengths with the largest sum up to `room`, with the first if possible.

    Subset sum by dynamic programming. Bit s of `sums[i]` says that some of the first i add up to s.
    """
    sums = [1]
    for length in lengths:
        if sums[-1] >> room:
            break
        sums.append((sums[-1] | sums[-1] << length) & ((2 << room) - 1))
    total = sums[-1].bit_length() - 1
    chosen = []
    for place in reversed(range(len(sums) - 1)):
        if not sums[place] >> total & 1:
            chosen.append(place)
            total -= lengths[place]
    return chosen[::-1]


def check_fits(lengths: np.ndarray, row_length: int) -> None:
    """Raises ValueError if a sequence has no token or more than a row."""
    outside = np.flatnonzero((lengths < 1) | (lengths > row_length))
    if outside.size:
        worst = int(outside[0])
        raise ValueError(
            f"request {worst} has {lengths[worst]} tokens; expected 1 to {row_length}, the row "
            "length. Nothing is truncated: shorten it or use longer rows"
        )
