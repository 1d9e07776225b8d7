"""Captioned windows of the digit scenes, for contrastive pre-training.

A curriculum shows windows of one cell first, then of four, then whole pictures. Scenes of one
layout get the same window, so that they differ in their digits alone.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import ml_collections
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from prumerge_jax.data import images, pipeline
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.digits import questions as digits_questions
from prumerge_jax.digits import scenes as digits
from prumerge_jax.digits.contrastive import CaptionBatch
from prumerge_jax.models.config import VisionConfig
from prumerge_jax.sharding.processes import DataShards, to_global_array
from prumerge_jax.training import inputs
from prumerge_jax.training.batches import Prepared


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
    """A square part of a scene and what it shows.

    Attributes:
      pixels: uint8 [s, s, 3].
      patches: int32 [N], its patches as raster indices of the whole picture.
      ids: int32 [T], the caption of what it shows, from BOS to EOS.
    """

    pixels: np.ndarray
    patches: np.ndarray
    ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class WindowsOfGroup:
    """Cuts the same windows out of the scenes of one layout.

    Attributes:
      tokenizer: of the captions.
      vision: its grid says which patches a window has.
      cells: side of a window in cells of the scene.
      count: windows per scene. Reading a scene costs as much as a step on a window of one cell.
    """

    tokenizer: Tokenizer
    vision: VisionConfig
    cells: int
    count: int

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> list[Window]:
        """The windows of stored `digits_vqa` records, each showing at least one digit.

        Those of one place follow each other. A layout of fewer places repeats them.
        """
        occupied = [digits.PLACES.index(place.decode()) for place in records[0]["places"]]
        steps = range(digits.GRID - self.cells + 1)
        corners = [
            (row, column)
            for row in steps
            for column in steps
            if any(self._inside(cell, row, column) for cell in occupied)
        ]
        # A function of the layout's first scene, so that it is the same in a resumed run.
        random = np.random.RandomState(int(records[0]["id"].rsplit(b"_", 1)[1]))
        order = np.resize(random.permutation(len(corners)), self.count)
        pictures = [np.asarray(images.load_image(record["image"])) for record in records]
        return [
            self._window(record, picture, *corners[place])
            for place in order
            for record, picture in zip(records, pictures, strict=True)
        ]

    def _inside(self, cell: int, row: int, column: int) -> bool:
        cell_row, cell_column = divmod(cell, digits.GRID)
        return 0 <= cell_row - row < self.cells and 0 <= cell_column - column < self.cells

    def _window(
        self, record: Mapping[str, Any], picture: np.ndarray, row: int, column: int
    ) -> Window:
        top, left = row * digits.CELL, column * digits.CELL
        side = self.cells * digits.CELL
        names = [place.decode() for place in record["places"]]
        seen = [self._inside(digits.PLACES.index(name), row, column) for name in names]
        places = tuple(name for name, here in zip(names, seen, strict=True) if here)
        shown = tuple(
            int(digit) for digit, here in zip(record["digits"], seen, strict=True) if here
        )
        grid, patch = self.vision.grid, self.vision.patch_size
        raster = np.arange(grid * grid, dtype=np.int32).reshape(grid, grid)
        cut = np.s_[top // patch : (top + side) // patch, left // patch : (left + side) // patch]
        return Window(
            picture[top : top + side, left : left + side],
            raster[cut].ravel(),
            _caption_ids(self.tokenizer, places, shown),
        )


def _caption_ids(
    tokenizer: Tokenizer, places: Sequence[str], shown: Sequence[int]
) -> NDArray[np.int32]:
    """The caption from BOS to EOS, [T]."""
    ids = tokenizer.encode(digits_questions.caption_of(places, shown))
    return np.array([tokenizer.bos_id, *ids, tokenizer.eos_id], np.int32)


def windows(
    config: ml_collections.ConfigDict,
    tokenizer: Tokenizer,
    vision: VisionConfig,
    total_steps: int,
) -> inputs.Inputs:
    """The windows of a run, by its curriculum.

    Args:
      config: of the run; `contrastive.curriculum` holds triples of a window's side in cells, the
        share of the steps that show such windows, and how many of them a scene gives.
      tokenizer: of the captions.
      vision: the tower's sizes.
      total_steps: of the run.

    Raises:
      ValueError: the shares do not add up to 1, or groups, layouts and batches do not fit.
    """
    group, batch_size = config.contrastive.group, config.batch_size
    curriculum = config.contrastive.curriculum
    if config.data.scenes_per_layout % group:
        raise ValueError(
            f"contrastive.group is {group}; expected a divisor of data.scenes_per_layout "
            f"{config.data.scenes_per_layout}"
        )
    for cells, _, count in curriculum:
        if batch_size % (group * count):
            raise ValueError(
                f"batch_size is {batch_size}; expected a multiple of {group * count}: "
                f"contrastive.group {group} times {count} windows of {cells} x {cells} cells"
            )
    if abs(sum(share for _, share, _ in curriculum) - 1) > 1e-6:
        raise ValueError(f"the shares of contrastive.curriculum {curriculum} do not add up to 1")
    source = inputs.record_source(config.data)
    groups = pipeline.grouped(grain.MapDataset.source(source), group)

    def lists(used: int, rows: Collection[int]) -> Iterator[list[Window]]:
        done, passed = used // batch_size, 0.0
        for cells, share, count in curriculum:
            passed += share
            end = round(passed * total_steps)
            if end > done:
                cut = groups.map(WindowsOfGroup(tokenizer, vision, cells, count))
                members = group * count
                per_batch = batch_size // members
                ordered = pipeline.stream(cut, seed=config.seed, start=done * per_batch)
                needed = sorted({row // members for row in rows})
                batches = inputs.rows_of_batches(ordered, per_batch, needed)[: end - done]
                for batch in inputs.read(batches, config):
                    windows_of = dict(zip(needed, batch, strict=True))
                    yield [windows_of[row // members][row % members] for row in rows]
                done = end

    return inputs.Inputs(lists, len(source) // group * group)


class CaptionFeed:
    """Places batches of windows on the devices, captions padded to one length per window size.

    Args:
      tokenizer: of the captions.
      max_length: of the text tower; a longer caption is an error.
      mesh: the devices.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_length: int, mesh: Mesh) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._mesh = mesh
        self._shards = DataShards.of(mesh)
        self._length = functools.cache(self._longest)

    def __call__(self, lists: Iterator[list[Window]], samples: int) -> Iterator[Prepared]:
        """Prepares global batches of which `lists` holds this process's windows.

        `samples` were used before the first of them, over all processes.
        """
        for batch in lists:
            size = len(batch) * self._shards.total // len(self._shards.local)
            samples += size
            yield Prepared([self._place(batch)], samples, {"samples": size, "images": size})

    def _place(self, batch: Sequence[Window]) -> CaptionBatch:
        length = self._length(batch[0].pixels.shape[0] // digits.CELL)
        lengths = np.array([window.ids.size for window in batch], np.int32)
        ids = np.zeros((len(batch), length), np.int32)
        for row, window in zip(ids, batch, strict=True):
            row[: window.ids.size] = window.ids
        fields = CaptionBatch(
            pixels=np.stack([window.pixels for window in batch]),
            patches=np.stack([window.patches for window in batch]),
            ids=ids,
            lengths=lengths,
        )
        return jax.tree.map(lambda field: to_global_array(field, self._mesh), fields)

    def _longest(self, cells: int) -> int:
        """T: tokens of the longest caption of a window of that side."""
        shown = min(cells * cells, digits.MAX_DIGITS)
        longest = max(
            len(_caption_ids(self._tokenizer, digits.PLACES[:shown], (digit,) * shown))
            for digit in range(10)
        )
        if longest > self._max_length:
            raise ValueError(
                f"a caption of {shown} digits has {longest} tokens; set "
                f"contrastive.text.max_positions, now {self._max_length}, to at least as many"
            )
        return longest
