"""Plans that turn sequences of many lengths into rows of one length.

PruMerge leaves every image with a different number of visual tokens. Padding all sequences to the
longest would compute several times the real tokens; packing them into rows of a fixed length (see
`fill_rows`) computes hardly any more, at one compiled shape. The planner needs lengths and text
alone, never the visual tokens themselves, so it runs on the host (NumPy) while the device encodes.
Which visual tokens take the place of an image is given to it as a `Run`, see `visual_layout`.

Shapes: L row length. The pool is the array of the encoded visual tokens, its slots on one axis.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from prumerge_jax.data.tokens import IGNORE, IMAGE_TOKEN
from prumerge_jax.messages import quoted

PositionIds = Literal["compact", "original"]


def check_position_ids(position_ids: str) -> None:
    """Raises ValueError for other values than those of `PositionIds`."""
    if position_ids not in get_args(PositionIds):
        raise ValueError(
            f"position_ids is {quoted(position_ids)}; expected 'compact' or 'original'"
        )


NEWLINE = -2
"""In place of a slot of the pool: the vector that a model has learned for the end of a row."""

_TEXT = -1
"""In place of a slot of the pool: a text token or padding."""


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """What takes the place of one placeholder: the visual tokens of an image, in order.

    Attributes:
      index: int32 [n], the slot of the pool of each token, or `NEWLINE`.
      offset: int32 [n], the position of each in the image without reduction, from 0; only
        `position_ids` of `original` reads it.
      span: positions of the whole image without reduction.
    """

    index: np.ndarray
    offset: np.ndarray
    span: int

    def __post_init__(self) -> None:
        if self.index.ndim != 1 or self.offset.shape != self.index.shape:
            raise ValueError(
                f"index {self.index.shape} and offset {self.offset.shape}; expected [n] both"
            )

    def __len__(self) -> int:
        return self.index.size


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


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """A batch of filled rows, and where each request went.

    Attributes:
      ids: int32 [rows, L], text token ids; 0 at visual tokens and padding.
      visual_index: int32 [rows, L], slot of the pool of the visual token, or `NEWLINE`; -1 at text
        and padding.
      positions: int32 [rows, L], from 0 in every segment; 0 at padding.
      segment_ids: int32 [rows, L], 1, 2, ... along each row; 0 at padding.
      targets: int32 [rows, L], the label of the next position of the same segment, or `IGNORE`.
      requests: int32 [n], the requests in these rows, ascending, as indices of the planner's input.
      row_of: int32 [n], the row of each of them.
      start_of: int32 [n], the column of its first token.
      length_of: int32 [n], its tokens, visual ones included.
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


def sequence_lengths(requests: Sequence[Request]) -> np.ndarray:
    """Tokens of each request once visual tokens have replaced the placeholders, int64 [n]."""
    return np.array(
        [r.token_ids.size - len(r.runs) + sum(len(run) for run in r.runs) for r in requests],
        np.int64,
    )


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
    _check_fits(lengths, row_length)
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


def pack_window(
    requests: Sequence[Request],
    num_slots: int,
    row_length: int,
    num_rows: int,
    *,
    shards: int = 1,
    position_ids: PositionIds = "compact",
    carried_over: int = 0,
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

    Raises:
      ValueError: a request is longer than a row, refers to a slot that the pool lacks or to slots
        of two shards; `num_rows` or the slots do not divide by `shards`.
    """
    batches = _plan(requests, num_slots, row_length, num_rows, shards, carried_over)
    tokens = _expand(requests, position_ids)
    return [_fill(tokens, batch, row_length) for batch in batches]


def _check_fits(lengths: np.ndarray, row_length: int) -> None:
    outside = np.flatnonzero((lengths < 1) | (lengths > row_length))
    if outside.size:
        worst = int(outside[0])
        raise ValueError(
            f"request {worst} has {lengths[worst]} tokens; expected 1 to {row_length}, the row "
            "length. Nothing is truncated: shorten it or use longer rows"
        )


def _plan(
    requests: Sequence[Request],
    num_slots: int,
    row_length: int,
    num_rows: int,
    shards: int,
    carried_over: int,
) -> list[list[list[int]]]:
    """Which requests are in which row of which batch: [batch][row] -> request indices."""
    if num_rows < 1 or num_rows % shards:
        raise ValueError(f"num_rows {num_rows} is not a positive multiple of {shards} shards")
    lengths = sequence_lengths(requests)
    _check_fits(lengths, row_length)
    shard_of = _shard_of_requests(requests, num_slots, lengths, shards)
    rows_of_shard = []
    for shard in range(shards):
        members = np.flatnonzero(shard_of == shard)
        packed = fill_rows(
            lengths[members], row_length, carried_over=int(np.count_nonzero(members < carried_over))
        )
        rows_of_shard.append([members[row].tolist() for row in packed])
    block = num_rows // shards
    batches = -(-max(len(rows) for rows in rows_of_shard) // block)
    for rows in rows_of_shard:
        rows += [[] for _ in range(batches * block - len(rows))]
    return [
        [row for rows in rows_of_shard for row in rows[batch * block : (batch + 1) * block]]
        for batch in range(batches)
    ]


def _shard_of_requests(
    requests: Sequence[Request], num_slots: int, lengths: np.ndarray, shards: int
) -> np.ndarray:
    if num_slots % shards:
        raise ValueError(f"{num_slots} visual token slots do not divide into {shards} shards")
    shard_of = np.full(len(requests), -1)
    for index, request in enumerate(requests):
        slots = _concatenated([run.index for run in request.runs])
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


@dataclasses.dataclass(frozen=True, eq=False)
class _Tokens:
    """All tokens of all requests on one axis; `starts` and `lengths` [n] cut it into requests."""

    ids: np.ndarray
    visual_index: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


def _concatenated(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Integer arrays on one axis, int64; none give an empty one."""
    return np.concatenate([np.zeros(0, np.int64), *arrays])


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (lengths[0] numbers), starts[1], ... on one axis."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(lengths.sum())


def _expand(requests: Sequence[Request], position_ids: PositionIds) -> _Tokens:
    """Puts every placeholder's run in its place, for all requests at once."""
    check_position_ids(position_ids)
    if not requests:
        none = np.zeros(0, np.int64)
        return _Tokens(none, none, none, none, none, none)
    text = _concatenated([r.token_ids for r in requests])
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
    visual_index = np.full(origin.size, _TEXT)
    visual_index[visual] = _concatenated([run.index for run in runs])
    advance, offset = width, _ranges(np.zeros_like(width), width)
    if position_ids == "original":
        offset[visual] = _concatenated([run.offset for run in runs])
        advance = np.ones_like(width)
        advance[placeholder] = [run.span for run in runs]
    begin = np.cumsum(advance) - advance
    begin -= np.repeat(begin[text_starts], text_lengths)

    lengths = np.add.reduceat(width, text_starts)
    starts = np.cumsum(lengths) - lengths
    targets = np.full(origin.size, IGNORE)
    targets[:-1] = np.where(visual, IGNORE, labels[origin])[1:]
    targets[starts + lengths - 1] = IGNORE
    return _Tokens(
        ids=np.where(visual, 0, text[origin]),
        visual_index=visual_index,
        positions=begin[origin] + offset,
        targets=targets,
        starts=starts,
        lengths=lengths,
    )


def _fill(tokens: _Tokens, rows: list[list[int]], row_length: int) -> Rows:
    """Copies the tokens of the requests in `rows` to their places."""
    counts = [len(row) for row in rows]
    requests = np.array([index for row in rows for index in row], np.int64)
    row_of = np.repeat(np.arange(len(rows)), counts)
    segment_of = 1 + _ranges(np.zeros(len(rows), np.int64), np.array(counts))
    length_of = tokens.lengths[requests]
    ends = np.cumsum(length_of)
    before_row = np.concatenate([[0], ends])[np.cumsum(counts) - counts]
    start_of = ends - length_of - before_row[row_of]

    source = _ranges(tokens.starts[requests], length_of)
    destination = _ranges(row_of * row_length + start_of, length_of)

    def place(values: np.ndarray, padding: int) -> np.ndarray:
        flat = np.full(len(rows) * row_length, padding, np.int32)
        flat[destination] = values
        return flat.reshape(len(rows), row_length)

    order = np.argsort(requests)
    return Rows(
        ids=place(tokens.ids[source], 0),
        visual_index=place(tokens.visual_index[source], _TEXT),
        positions=place(tokens.positions[source], 0),
        segment_ids=place(np.repeat(segment_of, length_of), 0),
        targets=place(tokens.targets[source], IGNORE),
        requests=requests[order].astype(np.int32),
        row_of=row_of[order].astype(np.int32),
        start_of=start_of[order].astype(np.int32),
        length_of=length_of[order].astype(np.int32),
    )
