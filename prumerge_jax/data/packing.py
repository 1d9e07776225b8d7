"""Plans that turn sequences of many lengths into rows of one length.

PruMerge leaves every image with a different number of visual tokens. Padding all sequences to the
longest would compute several times the real tokens; packing them into rows of a fixed length (see
`fill_rows`) computes hardly any more, at one compiled shape. The planner needs lengths and text
alone, never the visual tokens themselves, so it runs on the host (NumPy) while the device encodes.

Shapes: B images of the encoded batch, R capacity (visual token slots per image), N patches.
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


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One sequence of text with its images.

    Attributes:
      token_ids: int32 [T], one `IMAGE_TOKEN` per image at the place of its visual tokens.
      image_rows: row b in the encoded batch for each image, in the order of the placeholders.
      labels: int32 [T], the token itself where it is to be predicted and `IGNORE` elsewhere; None
        predicts nothing.
    """

    token_ids: np.ndarray
    image_rows: tuple[int, ...] = ()
    labels: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.token_ids.ndim != 1 or not self.token_ids.size:
            raise ValueError(
                f"token_ids has shape {self.token_ids.shape}; expected one dimension, not empty"
            )
        placeholders = int(np.count_nonzero(self.token_ids == IMAGE_TOKEN))
        if placeholders != len(self.image_rows):
            raise ValueError(
                f"token_ids holds {placeholders} image placeholders ({IMAGE_TOKEN}) for "
                f"{len(self.image_rows)} images; each image needs exactly one"
            )
        if self.labels is not None and self.labels.shape != self.token_ids.shape:
            raise ValueError(
                f"labels has shape {self.labels.shape}, token_ids {self.token_ids.shape}; "
                "they must be equal"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class VisualLayout:
    """What the planner knows of an encoded batch of images: counts and places, not values.

    Attributes:
      lengths: int32 [B], valid visual tokens per image, the extra token included.
      patch_indices: int32 [B, R], the patch each visual token came from; -1 for the extra token.
      num_patches: N, the patches of an unreduced image.
    """

    lengths: np.ndarray
    patch_indices: np.ndarray
    num_patches: int

    def __post_init__(self) -> None:
        if self.patch_indices.ndim != 2 or self.lengths.shape != self.patch_indices.shape[:1]:
            raise ValueError(
                f"lengths {self.lengths.shape} and patch_indices {self.patch_indices.shape} "
                "do not fit; expected [B] and [B, R]"
            )
        outside = np.flatnonzero((self.lengths < 0) | (self.lengths > self.capacity))
        if outside.size:
            image = int(outside[0])
            raise ValueError(
                f"image row {image} has {self.lengths[image]} visual tokens; expected 0 to "
                f"{self.capacity}, the capacity it was encoded with"
            )

    @property
    def capacity(self) -> int:
        """R, the visual token slots per image."""
        return self.patch_indices.shape[1]


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """A batch of filled rows, and where each request went.

    Attributes:
      ids: int32 [rows, L], text token ids; 0 at visual tokens and padding.
      visual_index: int32 [rows, L], b * R + slot of the visual token; -1 at text and padding.
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


def sequence_lengths(requests: Sequence[Request], layout: VisualLayout) -> np.ndarray:
    """Tokens of each request once visual tokens have replaced the placeholders.

    Returns:
      int64 [len(requests)].

    Raises:
      ValueError: a request names an image row that the layout does not have.
    """
    images = _image_rows(requests, layout)
    owner = np.repeat(np.arange(len(requests)), [len(r.image_rows) for r in requests])
    lengths = np.array([r.token_ids.size - len(r.image_rows) for r in requests], np.int64)
    np.add.at(lengths, owner, layout.lengths[images])
    return lengths


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
    layout: VisualLayout,
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
      layout: the encoded images that the requests refer to.
      row_length: L.
      num_rows: rows of every batch; where requests run out, rows are left as padding.
      shards: the data shards over which both the encoded images and the rows are split into equal
        contiguous blocks. A request goes to the shard of its images, so that gathering visual
        tokens needs no communication; requests without an image fill the emptiest shards.
      position_ids: `compact` numbers the tokens consecutively. `original` gives a visual token the
        position its patch has without reduction (the extra token that of the last patch) and lets
        the text continue after all N patches.
      carried_over: this many of the first requests get the first rows; the others fill up what is
        left.

    Raises:
      ValueError: a request is longer than a row, refers to an image that the layout lacks or to
        images of two shards; `num_rows` or the images do not divide by `shards`.
    """
    packed = pack_together(
        requests,
        [layout],
        [row_length],
        num_rows,
        shards=shards,
        position_ids=position_ids,
        carried_over=carried_over,
    )
    return [rows for (rows,) in packed]


def pack_together(
    requests: Sequence[Request],
    layouts: Sequence[VisualLayout],
    row_lengths: Sequence[int],
    num_rows: int,
    *,
    shards: int = 1,
    position_ids: PositionIds = "compact",
    carried_over: int = 0,
) -> list[tuple[Rows, ...]]:
    """Packs a window of requests once per layout, every time into the same rows in the same order.

    Args:
      layouts: of the same images, which have different visual tokens in each.
      row_lengths: L of each.
      others: as in `pack_window`, which also says what is raised.
    """
    # In units of the first row length; where these fit, all do.
    lengths = np.max(
        [
            -(-sequence_lengths(requests, layout) * row_lengths[0] // row_length)
            for layout, row_length in zip(layouts, row_lengths, strict=True)
        ],
        axis=0,
    )
    batches = _plan(requests, layouts[0], lengths, row_lengths[0], num_rows, shards, carried_over)
    tokens = [_expand(requests, layout, position_ids) for layout in layouts]
    return [
        tuple(
            _fill(expanded, batch, row_length)
            for expanded, row_length in zip(tokens, row_lengths, strict=True)
        )
        for batch in batches
    ]


def _check_fits(lengths: np.ndarray, row_length: int) -> None:
    outside = np.flatnonzero((lengths < 1) | (lengths > row_length))
    if outside.size:
        worst = int(outside[0])
        raise ValueError(
            f"request {worst} has {lengths[worst]} tokens; expected 1 to {row_length}, the row "
            "length. Nothing is truncated: shorten it or use longer rows"
        )


def _image_rows(requests: Sequence[Request], layout: VisualLayout) -> np.ndarray:
    """The image rows of all requests, one after the other."""
    rows = np.array([row for request in requests for row in request.image_rows], np.int64)
    outside = np.flatnonzero((rows < 0) | (rows >= layout.lengths.size))
    if outside.size:
        owner = np.repeat(np.arange(len(requests)), [len(r.image_rows) for r in requests])
        index = int(owner[outside[0]])
        raise ValueError(
            f"request {index} refers to image rows {requests[index].image_rows}; the encoded "
            f"batch has {layout.lengths.size}"
        )
    return rows


def _plan(
    requests: Sequence[Request],
    layout: VisualLayout,
    lengths: np.ndarray,
    row_length: int,
    num_rows: int,
    shards: int,
    carried_over: int,
) -> list[list[list[int]]]:
    """Which requests are in which row of which batch: [batch][row] -> request indices."""
    if num_rows < 1 or num_rows % shards:
        raise ValueError(f"num_rows {num_rows} is not a positive multiple of {shards} shards")
    _check_fits(lengths, row_length)
    shard_of = _shard_of_requests(requests, layout, lengths, shards)
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
    requests: Sequence[Request], layout: VisualLayout, lengths: np.ndarray, shards: int
) -> np.ndarray:
    images = layout.lengths.size
    if images % shards:
        raise ValueError(f"{images} encoded images do not divide into {shards} shards")
    shard_of = np.full(len(requests), -1)
    for index, request in enumerate(requests):
        homes = {row * shards // images for row in request.image_rows}
        if len(homes) > 1:
            raise ValueError(
                f"request {index} has images {request.image_rows} on shards {sorted(homes)}; "
                "all images of a request must be on one shard"
            )
        if homes:
            shard_of[index] = homes.pop()
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


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ... (lengths[0] numbers), starts[1], ... on one axis."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(lengths.sum())


def _expand(
    requests: Sequence[Request], layout: VisualLayout, position_ids: PositionIds
) -> _Tokens:
    """Replaces every placeholder by its image's visual tokens, for all requests at once."""
    check_position_ids(position_ids)
    if not requests:
        none = np.zeros(0, np.int64)
        return _Tokens(none, none, none, none, none, none)
    text = np.concatenate([r.token_ids for r in requests]).astype(np.int64)
    labels = np.concatenate(
        [np.full(r.token_ids.size, IGNORE) if r.labels is None else r.labels for r in requests]
    )
    text_lengths = np.array([r.token_ids.size for r in requests])
    text_starts = np.cumsum(text_lengths) - text_lengths
    placeholder = text == IMAGE_TOKEN
    image = np.full(text.size, -1)
    image[placeholder] = _image_rows(requests, layout)
    width = np.ones(text.size, np.int64)
    width[placeholder] = layout.lengths[image[placeholder]]

    # From here on one entry per packed token: `origin` is the text position that it came from.
    origin = np.repeat(np.arange(text.size), width)
    slot = _ranges(np.zeros_like(width), width)
    visual = placeholder[origin]
    advance, offset = width, slot
    if position_ids == "original":
        patch = layout.patch_indices[image[origin[visual]], slot[visual]]
        offset = np.zeros_like(slot)
        offset[visual] = np.where(patch < 0, layout.num_patches - 1, patch)
        advance = np.where(placeholder, layout.num_patches, 1)
    begin = np.cumsum(advance) - advance
    begin -= np.repeat(begin[text_starts], text_lengths)

    lengths = np.add.reduceat(width, text_starts)
    starts = np.cumsum(lengths) - lengths
    targets = np.full(origin.size, IGNORE)
    targets[:-1] = np.where(visual, IGNORE, labels[origin])[1:]
    targets[starts + lengths - 1] = IGNORE
    return _Tokens(
        ids=np.where(visual, 0, text[origin]),
        visual_index=np.where(visual, image[origin] * layout.capacity + slot, -1),
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
        visual_index=place(tokens.visual_index[source], -1),
        positions=place(tokens.positions[source], 0),
        segment_ids=place(np.repeat(segment_of, length_of), 0),
        targets=place(tokens.targets[source], IGNORE),
        requests=requests[order].astype(np.int32),
        row_of=row_of[order].astype(np.int32),
        start_of=start_of[order].astype(np.int32),
        length_of=length_of[order].astype(np.int32),
    )
