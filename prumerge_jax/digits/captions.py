"""Captioned windows of the digit scenes, for contrastive pre-training.

A curriculum shows windows of one cell first, then of four, then full images. Scenes of one
layout get the same window, so that they differ in their digits alone.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from prumerge_jax.data import images, pipeline
from prumerge_jax.data.datasets import open_dataset
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.digits import questions as digits_questions
from prumerge_jax.digits import scenes as digits
from prumerge_jax.digits.contrastive import CaptionBatch
from prumerge_jax.models.config import VisionConfig
from prumerge_jax.sharding.processes import DataShards, to_global_array
from prumerge_jax.training import inputs
from prumerge_jax.training.batches import GlobalBatch
from prumerge_jax.training.config import ConfigError, TrainConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
    """A square part of a scene and what it shows.

    Attributes:
      pixels: uint8 [s, s, 3].
      patches: int32 [N], its patches as raster indices of the full image.
      ids: int32 [T], the caption of what it shows, from BOS to EOS.
    """

    pixels: np.ndarray
    patches: np.ndarray
    ids: np.ndarray


@dataclasses.dataclass(frozen=True)
class WindowsOfGroup:
    """Cuts the same windows out of the scenes of one layout.

    Attributes:
      tokenizer: tokenizer of the captions.
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
        scenes = [np.asarray(images.load_image(record["image"])) for record in records]
        return [
            self._window(record, scene, *corners[place])
            for place in order
            for record, scene in zip(records, scenes, strict=True)
        ]

    def _inside(self, cell: int, row: int, column: int) -> bool:
        cell_row, cell_column = divmod(cell, digits.GRID)
        return 0 <= cell_row - row < self.cells and 0 <= cell_column - column < self.cells

    def _window(
        self, record: Mapping[str, Any], scene: np.ndarray, row: int, column: int
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
            scene[top : top + side, left : left + side],
            raster[cut].ravel(),
            _caption_ids(self.tokenizer, places, shown),
        )


def _caption_ids(
    tokenizer: Tokenizer, places: Sequence[str], shown: Sequence[int]
) -> NDArray[np.int32]:
    """The caption from BOS to EOS, [T]."""
    ids = tokenizer.encode(digits_questions.caption_of(places, shown))
    return np.array([tokenizer.bos_id, *ids, *tokenizer.encode_markup("</s>")], np.int32)


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """Which windows a run shows, in which order.

    Attributes:
      group: K, how many consecutive images compete.
      stages: triples of a window's side in cells, the share of the steps that show such windows,
        and how many of them a scene gives.
    """

    group: int
    stages: tuple[tuple[int, float, int], ...]

    def check(self, config: TrainConfig, scenes_per_layout: int) -> None:
        """Checks that groups, layouts and batches fit each other.

        Raises:
          ConfigError: they do not, or the shares do not add up to 1.
        """
        if scenes_per_layout % self.group:
            raise ConfigError(
                f"objective_options.group is {self.group}; expected a divisor of "
                f"data.scenes_per_layout {scenes_per_layout}"
            )
        for cells, _, count in self.stages:
            if config.batch_size % (self.group * count):
                raise ConfigError(
                    f"batch_size is {config.batch_size}; expected a multiple of "
                    f"{self.group * count}: objective_options.group {self.group} times {count} "
                    f"windows of {cells} x {cells} cells"
                )
        if abs(sum(share for _, share, _ in self.stages) - 1) > 1e-6:
            raise ConfigError(
                f"the shares of objective_options.curriculum {self.stages} do not add up to 1"
            )


def open_windows(
    config: TrainConfig, tokenizer: Tokenizer, vision: VisionConfig, curriculum: Curriculum
) -> inputs.TrainingSource:
    """The windows of a run, by its curriculum.

    Args:
      config: configuration of the run; its data set is `digits_vqa`.
      tokenizer: tokenizer of the captions.
      vision: the tower's sizes.
      curriculum: which windows.

    Raises:
      ConfigError: as `Curriculum.check`, or the run has no `steps`.
    """
    if config.steps is None:
        raise ConfigError(
            "steps is not set, and the contrastive curriculum is made of shares of them"
        )
    total_steps, group, batch_size = config.steps, curriculum.group, config.batch_size
    dataset = open_dataset(config.data)
    curriculum.check(config, config.data.options["scenes_per_layout"])

    def prepare() -> inputs.TrainingData:
        source = dataset.records().source
        groups = pipeline.grouped(grain.MapDataset.source(source), group)

        def batches(start: int, rows: Collection[int], shards: int) -> Iterator[list[Window]]:
            done, passed = start // batch_size, 0.0
            for cells, share, count in curriculum.stages:
                passed += share
                end = round(passed * total_steps)
                if end > done:
                    cut = groups.map(WindowsOfGroup(tokenizer, vision, cells, count))
                    members = group * count
                    per_batch = batch_size // members
                    ordered = pipeline.stream(cut, seed=config.seed, start=done * per_batch)
                    needed = sorted({row // members for row in rows})
                    chosen = inputs.rows_of_batches(ordered, per_batch, needed)[: end - done]
                    for batch in inputs.read(chosen, config.run):
                        windows_of = dict(zip(needed, batch, strict=True))
                        yield [windows_of[row // members][row % members] for row in rows]
                    done = end

        return inputs.TrainingData(batches, len(source) // group * group)

    return inputs.TrainingSource(dataset.samples, prepare)


class CaptionPacker:
    """Places batches of windows on the devices, captions padded to one length per window size.

    Args:
      tokenizer: tokenizer of the captions.
      max_length: positions of the text tower; a longer caption is an error.
      mesh: the devices.
    """

    def __init__(self, tokenizer: Tokenizer, *, max_length: int, mesh: Mesh) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._mesh = mesh
        self._shards = DataShards.of(mesh)
        self._length = functools.cache(self._longest)

    def __call__(self, batches: Iterable[list[Window]], samples: int) -> Iterator[GlobalBatch]:
        """Prepares global batches of which `batches` holds this process's windows.

        `samples` were used before the first of them, over all processes.
        """
        for batch in batches:
            size = len(batch) * self._shards.total // len(self._shards.local)
            samples += size
            yield GlobalBatch([self._place(batch)], samples, {"samples": size, "images": size})

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
                f"objective_options.text.max_positions, now {self._max_length}, to at least as many"
            )
        return longest
