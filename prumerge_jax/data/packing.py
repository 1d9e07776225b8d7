"""Plans that turn sequences of many lengths into rows of one length.

PruMerge leaves every image with a different number of visual tokens. Padding all sequences to the
longest would compute several times the real tokens; packing them into rows of a fixed length (see
`filling`) computes hardly any more, at one compiled shape. The planner needs lengths and text
alone, never the visual tokens themselves, so it runs on the host (NumPy) while the device encodes.
Which visual tokens take the place of an image is given to it as a `Run`, see `visual_layout`.

Shapes: L row length. The pool is the array of the encoded visual tokens, its slots on one axis.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from prumerge_jax.data import filling
from prumerge_jax.data.filling import Group, fill_rows_with_groups
from prumerge_jax.data.prefixes import find_groups
from prumerge_jax.data.runs import NO_SLOT, Taps
from prumerge_jax.data.sequences import (
    PositionIds,
    Request,
    Tokens,
    concatenated,
    expand,
    expand_taps,
    ranges,
)
from prumerge_jax.data.tokens import IGNORE
from prumerge_jax.models.config import NEWLINE

_RowsOf = Callable[[np.ndarray], list[list[Group]]]
"""(requests of a shard) -> the groups in each of its rows."""


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """A batch of filled rows, and where each request went.

    Attributes:
      ids: int32 [rows, L], text token ids; 0 at visual tokens and padding.
      visual_index: int32 [rows, L], slot of the pool of the visual token, or `NEWLINE`; -1 at text
        and padding.
      positions: int32 [rows, L], from 0 in every segment; 0 at padding.
      segment_ids: int32 [rows, L], 1, 2, ... along each row; 0 at padding. Requests that share a
        prefix are one segment.
      targets: int32 [rows, L], the label of the next position of the same segment, or `IGNORE`.
      requests: int32 [n], the requests in these rows, ascending, as indices of the planner's input.
      row_of: int32 [n], the row of each of them.
      start_of: int32 [n], the column of the first token that is its own.
      length_of: int32 [n], its own tokens, visual ones included.
      prefix_start_of: int32 [n], the column of the prefix in front of them.
      prefix_length_of: int32 [n], tokens of that; 0 where all are its own.
      branch_ids: int32 [rows, L], 0 at prefixes, 1, 2, ... along each segment at what follows them,
        0 at everything else; None where nothing is shared.
      taps: index and weight [rows, L, TAPS] of what visual tokens are interpolated from; None where
        that was not asked for.
    """

    ids: np.ndarray
    visual_index: np.ndarray
    positions: np.ndarray
    segment_ids: np.ndarray
    targets: np.ndarray
    requests: np.ndarray
    row_of: np.ndarray
    start_of: np.ndarray
    length_of: np.ndarray
    prefix_start_of: np.ndarray
    prefix_length_of: np.ndarray
    branch_ids: np.ndarray | None
    taps: Taps | None = None

    def prefix_of(self, place: int) -> tuple[int, int]:
        """Row and column of the prefix of number `place` of the requests, or of its own tokens."""
        shares = self.prefix_length_of[place] > 0
        start = self.prefix_start_of[place] if shares else self.start_of[place]
        return int(self.row_of[place]), int(start)

    @property
    def real_tokens(self) -> int:
        """Tokens that are no padding."""
        return int(np.count_nonzero(self.segment_ids))

    def positions_of(self, place: int) -> np.ndarray:
        """Places of all tokens of the request at `place` of `requests`, its prefix first, int [T]
        into the flattened rows."""
        begin = self.row_of[place] * self.segment_ids.shape[1]
        prefix = self.prefix_start_of[place] + np.arange(self.prefix_length_of[place])
        own = self.start_of[place] + np.arange(self.length_of[place])
        return begin + np.concatenate([prefix, own])

    @property
    def request_tokens(self) -> int:
        """Tokens of the requests, each with its prefix."""
        return int(self.length_of.sum() + self.prefix_length_of.sum())


def pack_window(
    requests: Sequence[Request],
    num_slots: int,
    row_length: int,
    num_rows: int,
    *,
    shards: int = 1,
    position_ids: PositionIds = "compact",
    carried_over: int = 0,
    share_prefixes: bool = False,
    with_taps: bool = False,
) -> list[Rows]:
    """Packs a window of requests into as many batches of `num_rows` rows as it takes.

    Args:
      requests: the window.
      num_slots: slots of the pool that the requests' runs refer to.
      row_length: L.
      num_rows: rows of every batch; where requests run out, rows are left as padding.
      shards: the data shards over which both the pool and the rows are split into equal contiguous
        blocks. A request goes to the shard of its visual tokens, so that gathering them needs no
        communication; requests without any fill the emptiest shards.
      position_ids: `compact` numbers the tokens consecutively. `original` gives a visual token the
        position its patch has without reduction (the extra token that of the last patch) and lets
        the text continue after the whole image.
      carried_over: this many of the first requests get the first rows; the others fill up what is
        left.
      share_prefixes: whether requests of a row with the same visual tokens and text at their
        beginning have these once, see `prefixes`. What is predicted, and the position that predicts
        it, stays each request's own.
      with_taps: whether the rows have `taps`; without them no run may have any.

    Raises:
      ValueError: a request is longer than a row, refers to a slot that the pool lacks or to slots
        of two shards; `num_rows` or the slots do not divide by `shards`.
    """
    tokens = expand(requests, position_ids)
    taps = expand_taps(requests, tokens) if with_taps else None
    shard_of = _shard_of_requests(requests, num_slots, tokens.lengths, shards)

    def rows_of(members: np.ndarray) -> list[list[Group]]:
        first, others = members[members < carried_over], members[members >= carried_over]
        groups = _groups(tokens, first, share_prefixes)
        return fill_rows_with_groups(
            groups + _groups(tokens, others, share_prefixes),
            tokens.lengths,
            row_length,
            carried_over=len(groups),
        )

    filling.check_fits(tokens.lengths, row_length)
    batches = _batches(shard_of, shards, num_rows, rows_of)
    return [_fill(tokens, batch, row_length, taps) for batch in batches]


def pack_together(
    versions: Sequence[Sequence[Request]],
    num_slots: int,
    row_lengths: Sequence[int],
    num_rows: int,
    *,
    shards: int = 1,
    position_ids: PositionIds = "compact",
) -> list[tuple[Rows, ...]]:
    """Packs several versions of a window, each into the same rows in the same order.

    Args:
      versions: the same requests with other visual tokens.
      row_lengths: L of each version.
      num_slots, num_rows, shards, position_ids: as in `pack_window`, which says what is raised.
    """
    tokens = [expand(requests, position_ids) for requests in versions]
    # In units of the first row length; where these fit, all do.
    lengths = np.max(
        [-(-t.lengths * row_lengths[0] // n) for t, n in zip(tokens, row_lengths, strict=True)], 0
    )
    filling.check_fits(lengths, row_lengths[0])
    shard_of = _shard_of_requests(versions[0], num_slots, lengths, shards)
    batches = _batches(
        shard_of,
        shards,
        num_rows,
        lambda own: fill_rows_with_groups(_groups(tokens[0], own, False), lengths, row_lengths[0]),
    )
    fillings = list(zip(tokens, row_lengths, strict=True))
    return [tuple(_fill(each, batch, n, None) for each, n in fillings) for batch in batches]


def _groups(tokens: Tokens, members: np.ndarray, share_prefixes: bool) -> list[Group]:
    """Groups of the requests members [n]."""
    if not share_prefixes:
        return [Group(0, (index,)) for index in members.tolist()]
    groups = find_groups(*tokens.beginnings(members))
    return [Group(g.prefix, tuple(members[list(g.members)].tolist())) for g in groups]


def _batches(
    shard_of: np.ndarray, shards: int, num_rows: int, rows_of: _RowsOf
) -> list[list[list[Group]]]:
    """Batches of rows, [batch][row] -> groups, those of each shard; the last are empty where shards
    have fewer."""
    if num_rows < 1 or num_rows % shards:
        raise ValueError(f"num_rows {num_rows} is not a positive multiple of {shards} shards")
    rows_of_shard = [rows_of(np.flatnonzero(shard_of == shard)) for shard in range(shards)]
    block = num_rows // shards
    batches = -(-max(len(rows) for rows in rows_of_shard) // block)
    return [
        [
            rows[at] if at < len(rows) else []
            for rows in rows_of_shard
            for at in range(batch * block, (batch + 1) * block)
        ]
        for batch in range(batches)
    ]


def _shard_of_requests(
    requests: Sequence[Request], num_slots: int, lengths: np.ndarray, shards: int
) -> np.ndarray:
    if num_slots % shards:
        raise ValueError(f"{num_slots} visual token slots do not divide into {shards} shards")
    shard_of = np.full(len(requests), -1)
    for index, request in enumerate(requests):
        slots = concatenated([run.index for run in request.runs])
        slots = slots[slots != NEWLINE]
        if not slots.size:
            continue
        if slots.min() < 0 or slots.max() >= num_slots:
            stray = int(slots[(slots < 0) | (slots >= num_slots)][0])
            raise ValueError(
                f"request {index} refers to visual token slot {stray}; there are {num_slots}"
            )
        first, last = (int(slot) * shards // num_slots for slot in (slots.min(), slots.max()))
        if first != last:
            raise ValueError(
                f"request {index} has visual tokens on shards {first} to {last}; all images of a "
                "request must be on one shard"
            )
        shard_of[index] = first
    placed = shard_of >= 0
    load = np.bincount(shard_of[placed], weights=lengths[placed], minlength=shards)
    homeless = np.flatnonzero(~placed)
    for index in homeless[np.argsort(-lengths[homeless], kind="stable")].tolist():
        shard_of[index] = np.argmin(load)
        load[shard_of[index]] += lengths[index]
    return shard_of


class _Pieces(NamedTuple):
    """Stretches of requests' tokens in the order in which they fill the rows, each [pieces].

    Attributes:
      request: whose tokens they are; of a prefix, the first of those that share it.
      begin, length: where among its tokens.
      row, segment, branch: what they are part of.
    """

    request: np.ndarray
    begin: np.ndarray
    length: np.ndarray
    row: np.ndarray
    segment: np.ndarray
    branch: np.ndarray


def _pieces(lengths: np.ndarray, rows: Sequence[Sequence[Group]]) -> _Pieces:
    """The pieces of groups in rows: each one's prefix, where it has one, and its members."""
    pieces = []
    for row, groups in enumerate(rows):
        for segment, group in enumerate(groups, start=1):
            prefix = group.prefix if len(group.members) > 1 else 0
            if prefix:
                pieces.append((group.members[0], 0, prefix, row, segment, 0))
            for branch, member in enumerate(group.members, start=1):
                own = lengths[member] - prefix
                pieces.append((member, prefix, own, row, segment, branch if prefix else 0))
    return _Pieces(*np.array(pieces, np.int64).reshape(-1, 6).T)


def _fill(
    tokens: Tokens, rows: Sequence[Sequence[Group]], row_length: int, taps: Taps | None
) -> Rows:
    """Copies the tokens of the groups in `rows` to their places."""
    pieces = _pieces(tokens.lengths, rows)
    ends = np.cumsum(pieces.length)
    before_row = np.concatenate([[0], ends])[np.searchsorted(pieces.row, pieces.row)]
    start = ends - pieces.length - before_row
    source = ranges(tokens.starts[pieces.request] + pieces.begin, pieces.length)
    destination = ranges(pieces.row * row_length + start, pieces.length)

    def place(values: np.ndarray, padding: int, dtype: type = np.int32) -> np.ndarray:
        flat = np.full((len(rows) * row_length, *values.shape[1:]), padding, dtype)
        flat[destination] = values
        return flat.reshape(len(rows), row_length, *values.shape[1:])

    is_prefix = (pieces.branch == 0) & (pieces.length < tokens.lengths[pieces.request])
    # Every prefix stands in front of its branches.
    latest = np.maximum.accumulate(np.where(is_prefix, np.arange(len(start)), 0))
    own = np.flatnonzero(~is_prefix)
    own = own[np.argsort(pieces.request[own])]
    return Rows(
        ids=place(tokens.ids[source], 0),
        visual_index=place(tokens.visual_index[source], NO_SLOT),
        positions=place(tokens.positions[source], 0),
        segment_ids=place(np.repeat(pieces.segment, pieces.length), 0),
        targets=place(tokens.targets[source], IGNORE),
        requests=pieces.request[own].astype(np.int32),
        row_of=pieces.row[own].astype(np.int32),
        start_of=start[own].astype(np.int32),
        length_of=pieces.length[own].astype(np.int32),
        prefix_start_of=np.where(pieces.begin, start[latest], 0)[own].astype(np.int32),
        prefix_length_of=pieces.begin[own].astype(np.int32),
        branch_ids=place(np.repeat(pieces.branch, pieces.length), 0) if is_prefix.any() else None,
        taps=None
        if taps is None
        else Taps(place(taps.slots[source], NO_SLOT), place(taps.weight[source], 0, np.float32)),
    )
