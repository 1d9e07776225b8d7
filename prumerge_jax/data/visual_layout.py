"""Runs: which visual tokens stand where a prompt has its image, and at which positions.

The only place that knows how a model family lays out an image. Packing takes the runs as they are.

Shapes: B crops of the encoded batch, R capacity (visual token slots per crop), N patches.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np

from prumerge_jax.data.layout import Layout
from prumerge_jax.data.runs import NO_SLOT, TAPS, Run, Taps
from prumerge_jax.messages import quoted
from prumerge_jax.models.config import NEWLINE
from prumerge_jax.reductions import Reduction

Newlines = Literal["none", "row", "end"]
"""Newlines between pruned tokens, of models that have one: `none`, as all published methods; `row`
after every row of the mosaic that kept a token, whose tokens then come in the mosaic's order; `end`
one after the image."""


def check_newlines(newlines: str) -> None:
    """Raises ValueError for other values than those of `Newlines`."""
    if newlines not in get_args(Newlines):
        raise ValueError(f"newlines is {quoted(newlines)}; expected one of {get_args(Newlines)}")


@dataclasses.dataclass(frozen=True, eq=False)
class CropTokens:
    """What the host knows of the visual tokens of encoded crops: counts and places, not values.

    Attributes:
      lengths: int32 [B], valid visual tokens per crop, the extra token included.
      patch_indices: int32 [B, R], the patch each visual token came from; -1 for the extra token.
      num_patches: N, the patches of an unreduced crop.
      cls_slot: the slot of a frame that has the tower's CLS feature, which is in no length; None
        where frames have none.
      raster: whether the tokens of a crop are put into the order of their patches.

    Raises:
      ValueError: the shapes do not fit, or a length is outside of 0 to R.
    """

    lengths: np.ndarray
    patch_indices: np.ndarray
    num_patches: int
    cls_slot: int | None = None
    raster: bool = False

    def __post_init__(self) -> None:
        if self.patch_indices.ndim != 2 or self.lengths.shape != self.patch_indices.shape[:1]:
            raise ValueError(
                f"lengths {self.lengths.shape} and patch_indices {self.patch_indices.shape} "
                "do not fit; expected [B] and [B, R]"
            )
        outside = np.flatnonzero((self.lengths < 0) | (self.lengths > self.capacity))
        if outside.size:
            crop = int(outside[0])
            raise ValueError(
                f"image row {crop} has {self.lengths[crop]} visual tokens; expected 0 to "
                f"{self.capacity}, the capacity it was encoded with"
            )

    @property
    def capacity(self) -> int:
        """R, the visual token slots per crop."""
        return self.patch_indices.shape[1]

    @property
    def num_slots(self) -> int:
        """B * R, the slots of all crops together."""
        return self.patch_indices.size

    def are_whole(self, rows: Sequence[int]) -> bool:
        """Whether slot r of these crops is their patch r, of all patches."""
        patches = np.arange(self.num_patches)
        return self.capacity >= self.num_patches and bool(
            (self.patch_indices[list(rows), : self.num_patches] == patches).all()
        )


def runs(crops: CropTokens, rows: Iterable[int]) -> tuple[Run, ...]:
    """The run of each image that is the one crop in row b of the encoded batch, as in LLaVA-1.5.

    Its tokens stand in the order of their slots. Of the N positions of the whole image each takes
    that of its patch, the extra token that of the last patch.

    Args:
      crops: the encoded batch.
      rows: b of each image.

    Raises:
      ValueError: the batch has no such row.
    """
    return tuple(_single_crop(crops, row) for row in rows)


def _single_crop(crops: CropTokens, row: int) -> Run:
    if not 0 <= row < crops.lengths.size:
        raise ValueError(f"image row {row}; the encoded batch has {crops.lengths.size}")
    slot = np.arange(crops.lengths[row], dtype=np.int32)
    patch = crops.patch_indices[row, slot]
    return Run(
        index=row * crops.capacity + slot,
        offset=np.where(patch < 0, crops.num_patches - 1, patch).astype(np.int32),
        span=crops.num_patches,
    )


def shared_lengths(
    lengths: np.ndarray,
    content: np.ndarray,
    pictures: Iterable[tuple[Layout, Sequence[int]]],
    reduction: Reduction,
) -> np.ndarray:
    """The tokens that crops keep of those that they could, by `Reduction.crop_shares`.

    Frames of a video share nothing: each keeps as many as an image of one crop.

    Args:
      lengths: int32 [B], valid visual tokens per crop of the encoded batch.
      content: [B, N] float32 of `VisualTokens`.
      pictures: the layout of every image, and the rows of its crops, in their order.
      reduction: whose tokens they are.

    Returns:
      int32 [B].
    """
    kept = lengths.copy()
    for layout, rows in pictures:
        shared = list(rows) if layout.frames == 0 else list(rows[:1])
        tile = layout.tile_of_patch() if len(shared) > 1 else np.zeros(0, np.int32)
        shares = reduction.crop_shares(content[rows[0]], tile, len(shared))
        kept[list(rows)] = np.minimum(lengths[list(rows)], shares)
    return kept


def share_out(counts: np.ndarray, budget: int) -> np.ndarray:
    """How many of the patches that crops keep, int [C], remain of `budget` for all of them.

    In proportion; what rounding down leaves goes to the largest fractions, one each, the first crop
    first among equals.
    """
    total = int(counts.sum())
    if total <= budget:
        return counts
    shares, fractions = np.divmod(budget * counts, total)
    shares[np.argsort(-fractions, kind="stable")[: budget - shares.sum()]] += 1
    return shares


def run_of_picture(
    crops: CropTokens,
    layout: Layout,
    rows: Sequence[int],
    *,
    selects_patches: bool,
    newlines: Newlines = "none",
    budget: int | None = None,
) -> Run:
    """The run of an image or video; `run_of_whole_image` if nothing was pruned.

    Arguments as in `run_of_image`; `selects_patches` says whether a reduction chose tokens.
    """
    if not selects_patches and crops.are_whole(rows):
        return run_of_whole_image(crops, layout, rows)
    return run_of_image(crops, layout, rows, newlines, budget)


def run_of_image(
    crops: CropTokens,
    layout: Layout,
    rows: Sequence[int],
    newlines: Newlines = "none",
    budget: int | None = None,
) -> Run:
    """The run of an image or video whose tokens a reduction chose, crop by crop.

    Crop follows crop, frame follows frame, the tokens of each in the order of their slots, or of
    their patches where they are to be in `raster`; see `Newlines` for others. A token takes the
    position of its patch in the image without reduction, an extra token the largest of its crop.

    Args:
      crops: the encoded batch.
      layout: what the crops are.
      rows: the rows of the encoded batch that hold the crops, in their order.
      newlines: where newlines go.
      budget: most patches to keep of all crops together, see `share_out`; each crop keeps those of
        its first slots. Extra tokens and CLS features come on top. None for no limit.
    """
    slots = [np.arange(crops.lengths[row], dtype=np.int32) for row in rows]
    if budget is not None:
        slots = _within(budget, slots, [crops.patch_indices[row] for row in rows])
    if crops.raster:
        patches = (crops.patch_indices[row, slot] for row, slot in zip(rows, slots, strict=True))
        slots = [slot[np.argsort(patch)] for slot, patch in zip(slots, patches, strict=True)]
    index = np.concatenate([row * crops.capacity + s for row, s in zip(rows, slots, strict=True)])
    patch = crops.patch_indices.reshape(-1)[index]
    crop = np.repeat(np.arange(len(rows)), [slot.size for slot in slots])
    positions = layout.positions()
    on_image = layout.frames > 0 or layout.on_image()
    last = np.where(on_image, positions, 0).max(axis=1)
    offset = np.where(patch < 0, last[crop], positions[crop, patch])
    if crops.cls_slot is not None and layout.frames:
        starts = np.searchsorted(crop, np.arange(len(rows)))
        index = np.insert(index, starts, _cls_slots(crops, rows))
        offset = np.insert(offset, starts, np.arange(len(rows)) * layout.tokens_of_frame)
    if newlines == "row" and any(layout.tiles):
        index, offset = _with_newline_per_row(layout, index, offset, crop, patch)
    elif newlines == "end":
        index, offset = np.append(index, NEWLINE), np.append(offset, layout.span - 1)
    return Run(index.astype(np.int32), offset.astype(np.int32), layout.span)


def _cls_slots(crops: CropTokens, rows: Sequence[int]) -> np.ndarray:
    """The slots of the frames' CLS features, int [F]."""
    assert crops.cls_slot is not None
    return np.array(rows) * crops.capacity + crops.cls_slot


def _within(
    budget: int, slots: Sequence[np.ndarray], patches: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """The slots of each crop that a budget leaves; of the others merged neighbours go as well."""
    is_patch = [patch[slot] >= 0 for slot, patch in zip(slots, patches, strict=True)]
    shares = share_out(np.array([each.sum() for each in is_patch]), budget)
    return [
        slot[~each | (np.cumsum(each) <= share)]
        for slot, each, share in zip(slots, is_patch, shares, strict=True)
    ]


def _with_newline_per_row(
    layout: Layout, index: np.ndarray, offset: np.ndarray, crop: np.ndarray, patch: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Index and offset of a run: the whole image, the mosaic's rows, the tiles' extra tokens."""
    row, column = layout.mosaic_places()
    in_mosaic = (crop > 0) & (patch >= 0)
    beyond = row.max() + 1
    row_of = np.where(crop == 0, -1, np.where(in_mosaic, row[crop, patch], beyond))
    column_of = np.where(in_mosaic, column[crop, patch], np.arange(index.size))
    order = np.lexsort((column_of, row_of))
    index, offset, row_of = index[order], offset[order], row_of[order]
    is_end = (row_of >= 0) & (row_of < beyond) & (row_of != np.append(row_of[1:], beyond + 1))
    ends = np.flatnonzero(is_end)
    newline = layout.newline_positions(row_of[ends])
    return np.insert(index, ends + 1, NEWLINE), np.insert(offset, ends + 1, newline)


def run_of_whole_image(crops: CropTokens, layout: Layout, rows: Sequence[int]) -> Run:
    """The run of an image none of whose patches was pruned, newlines included, as transformers'.

    The whole image, then the mosaic of the tiles row by row as far as the image covers it. A mosaic
    that is shrunk is interpolated after the projector, and so is every frame of a video.

    Args:
      crops: the encoded batch, slot r of each crop its patch r.
      layout: what the crops are.
      rows: the rows of the encoded batch that hold the crops, in their order.
    """
    patches = np.array(rows)[:, None] * crops.capacity + np.arange(layout.num_patches)
    if layout.pooled == layout.grid:
        if layout.cls:
            patches = np.append(_cls_slots(crops, rows)[:, None], patches, axis=1)
        index = patches.reshape(-1)
        return Run(index.astype(np.int32), np.arange(layout.span, dtype=np.int32), layout.span)
    if layout.frames:
        return _run_of_frames(patches, layout)
    whole = _one_tap(patches[0])
    if any(layout.tiles):
        mosaic = layout.window_of(patches[1:])
        is_shrunk = mosaic.shape != layout.shape
        taps = _interpolated(mosaic, layout.shape) if is_shrunk else _one_tap(mosaic)
        ends = _one_tap(np.full((len(taps.slots), int(layout.newline)), NEWLINE))
    else:
        is_shrunk, taps = False, _one_tap(np.zeros((1, 0), np.int32))
        ends = _one_tap(np.full((1, int(layout.newline)), NEWLINE))
    lines = [np.concatenate(parts, axis=1) for parts in zip(taps, ends, strict=True)]
    index, weight = (
        np.concatenate([first, rest.reshape(-1, TAPS)])
        for first, rest in zip(whole, lines, strict=True)
    )
    return Run(
        index[:, 0].astype(np.int32),
        np.arange(layout.span, dtype=np.int32),
        layout.span,
        Taps(index.astype(np.int32), weight.astype(np.float32)) if is_shrunk else None,
    )


def _run_of_frames(patches: np.ndarray, layout: Layout) -> Run:
    """Frame after frame of a video whose patches have the slots [F, N], and one newline."""
    sides = (layout.pooled, layout.pooled)
    frames = [_interpolated(each.reshape(layout.grid, layout.grid), sides) for each in patches]
    end = _one_tap(np.full((int(layout.newline), 1), NEWLINE))
    slots, weight = (
        np.concatenate([each.reshape(-1, TAPS) for each in parts])
        for parts in zip(*frames, end, strict=True)
    )
    slots = slots.astype(np.int32)
    offset = np.arange(layout.span, dtype=np.int32)
    return Run(slots[:, 0], offset, layout.span, Taps(slots, weight.astype(np.float32)))


def _one_tap(index: np.ndarray) -> Taps:
    """Tokens [...] that are each one times that of a slot."""
    none = np.full((*index.shape, TAPS - 1), NO_SLOT)
    weight = np.zeros((*index.shape, TAPS), np.float32)
    weight[..., 0] = 1
    return Taps(np.concatenate([index[..., None], none], axis=-1), weight)


def _interpolated(index: np.ndarray, shape: tuple[int, int]) -> Taps:
    """Slots [R, C] shrunk to `shape`, bilinear between the middles of tokens, without antialiasing
    (torch's `interpolate(align_corners=False)`)."""
    (top, bottom, down), (left, right, across) = (
        _neighbours(size, target) for size, target in zip(index.shape, shape, strict=True)
    )
    corners = [index[np.ix_(r, c)] for r in (top, bottom) for c in (left, right)]
    weights = [np.outer(r, c) for r in (1 - down, down) for c in (1 - across, across)]
    return Taps(np.stack(corners, axis=-1), np.stack(weights, axis=-1))


def _neighbours(size: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each of `target` places: the entries of `size` before and after it, and the share of the
    latter."""
    place = np.maximum((np.arange(target) + 0.5) * size / target - 0.5, 0)
    before = np.floor(place).astype(int)
    return before, np.minimum(before + 1, size - 1), place - before
