"""The samples of a run: which data set, in which order, starting where.

A place in the data is one number, the samples used so far over all processes. Which samples share a
batch depends on the seed alone, so a resumed run continues exactly where the saved one stopped.
Within a batch they are dealt out so that the data shards of a mesh have about as much text each,
and as many tiles and frames: the fullest one decides how many micro-batches all of them run.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from prumerge_jax.data import pipeline
from prumerge_jax.data.datasets import DataConfig, Dataset, open_dataset
from prumerge_jax.data.images import ImageProcessor
from prumerge_jax.data.pictures import PictureProcessor
from prumerge_jax.data.pipeline import Example, Preprocessor
from prumerge_jax.data.templates import chat_template
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.messages import quoted
from prumerge_jax.training.config import ExecutionConfig, TrainConfig
from prumerge_jax.training.sample_sizes import check_targets, unreduced_tokens

_FOREVER = 1 << 40  # samples; more than any run uses


class TrainingData(NamedTuple):
    """The training samples of a run.

    Attributes:
      batches: (samples used, rows, shards) -> those rows of every global batch from there on; each
        a list. A batch is dealt out to so many equal blocks.
      samples: number of samples of an epoch.
    """

    batches: Callable[[int, Collection[int], int], Iterator[list[Any]]]
    samples: int


class TrainingSource(NamedTuple):
    """Samples that were found and checked; nothing is written before `prepare`.

    Attributes:
      samples: upper bound of the samples of an epoch.
      prepare: writes the records if they are not there yet, and gives the training samples.
    """

    samples: int
    prepare: Callable[[], TrainingData]


def open_conversations(
    config: TrainConfig,
    tokenizer: Tokenizer,
    fewest_visual_tokens: int,
    kept_share: float = 1.0,
) -> TrainingSource:
    """Labelled conversations as `Example`s, for the next-token loss.

    Args:
      config: configuration of the run, model sizes included.
      tokenizer: the model's.
      fewest_visual_tokens: lower bound of the tokens of an image.
      kept_share: how much of an image's tokens is taken to be left where samples of several crops
        are dealt out.

    Raises:
      ValueError: samples show what the model does not take.
    """
    dataset = open_dataset(config.data)
    vision = config.sizes.vision
    processor: ImageProcessor | PictureProcessor
    if config.shows_crops:
        mode = "anyres" if config.sizes.image_grid_pinpoints else config.image_mode
        processor = PictureProcessor(config.sizes, vision.image_size, mode)
    else:
        processor = ImageProcessor(vision.image_size, vision.pixel_mean, config.image_mode)
    for sample in dataset.conversations() if not config.shows_crops else ():
        if "images" in sample or "video" in sample:
            raise ValueError(
                f"sample {quoted(sample['id'])} shows several images or a video; the model takes "
                "one image per sample"
            )
    preprocess = Preprocessor(
        tokenizer,
        chat_template(config.conversation),
        processor,
        config.label_protocol,
        config.row_length,
    )

    def prepare() -> TrainingData:
        sizes = check_targets(config, dataset, preprocess, fewest_visual_tokens)
        if isinstance(processor, PictureProcessor):
            visual = unreduced_tokens(config, dataset, processor)
            sizes = sizes + np.rint(kept_share * visual).astype(int)
        return _conversations(config, dataset, preprocess, sizes)

    return TrainingSource(dataset.samples, prepare)


def in_order(source: TrainingSource) -> TrainingSource:
    """The same samples, each at the same row of its batch on any mesh."""

    def prepare() -> TrainingData:
        data = source.prepare()
        return TrainingData(lambda start, rows, shards: data.batches(start, rows, 1), data.samples)

    return TrainingSource(source.samples, prepare)


def _conversations(
    config: TrainConfig, dataset: Dataset, preprocess: Preprocessor, sizes: np.ndarray
) -> TrainingData:
    records = dataset.records()
    examples = pipeline.examples(records.source, preprocess, to_sample=records.to_sample)
    order = None
    if config.group_by_modality_length:
        order = ModalityOrder(records.has_image, config.batch_size, config.seed)

    def batches(start: int, rows: Collection[int], shards: int) -> Iterator[list[Example]]:
        if order is None:
            everyone = grain.MapDataset.range(len(examples))
            ordered = pipeline.stream(everyone, seed=config.seed, start=start)
        else:
            ordered = grain.MapDataset.range(_FOREVER)[start:].map(order)
        number = grain.MapDataset.range(len(ordered) // config.batch_size)
        dealt_rows = _DealtRows(
            examples, ordered, sizes[records.entries], config.batch_size, tuple(rows), shards
        )
        return read(number.map(dealt_rows), config.run)

    return TrainingData(batches, len(records.source) if order is None else order.epoch_size)


def record_source(data: DataConfig) -> Sequence[Mapping[str, Any]]:
    """The training records that `data` names, written below `data.directory` if need be.

    Raises:
      ValueError: there is no data set of that name, or its samples cannot be used.
      OSError: a file cannot be read.
    """
    return open_dataset(data).records().source


@dataclasses.dataclass(frozen=True, eq=False)
class _RowsOfBatch:
    """Selects `rows` out of every `size` elements of a data set."""

    dataset: grain.MapDataset[Any]
    size: int
    rows: tuple[int, ...]

    def __call__(self, batch: int) -> list[Any]:
        return [self.dataset[batch * self.size + row] for row in self.rows]


@dataclasses.dataclass(frozen=True, eq=False)
class _DealtRows:
    """Selects `rows` out of every batch that was dealt out to `shards`.

    Attributes:
      examples: all samples.
      ordered: their numbers in the order of the run.
      sizes: int [samples], tokens of text; where samples have several crops, visual ones too.
      size: samples of a batch.
      rows: those that are made.
      shards: equal blocks of a batch.
    """

    examples: grain.MapDataset[Example]
    ordered: grain.MapDataset[int]
    sizes: np.ndarray
    size: int
    rows: tuple[int, ...]
    shards: int

    def __call__(self, batch: int) -> list[Example]:
        places = range(batch * self.size, (batch + 1) * self.size)
        members = np.array([self.ordered[place] for place in places])
        members = members[dealt(self.sizes[members], self.shards)]
        return [self.examples[int(members[row])] for row in self.rows]


def dealt(sizes: np.ndarray, shards: int) -> np.ndarray:
    """The order of samples in which shards, each an equal block of them, have about as many tokens.

    The longest first, each to the shard that has least so far and is not full.

    Args:
      sizes: [n] int, tokens of the samples; a multiple of `shards` of them.
      shards: their number.
    """
    block = len(sizes) // shards
    members: list[list[int]] = [[] for _ in range(shards)]
    load = np.zeros(shards)
    for index in np.argsort(-sizes, kind="stable").tolist():
        shard = int(np.argmin(load))
        members[shard].append(index)
        load[shard] += sizes[index]
        if len(members[shard]) == block:
            load[shard] = np.inf
    return np.concatenate([np.sort(each) for each in members])


def rows_of_batches(
    ordered: grain.MapDataset[Any], size: int, rows: Collection[int]
) -> grain.MapDataset[list[Any]]:
    """These rows of every batch of `size` elements; the other elements are never made."""
    batches = grain.MapDataset.range(len(ordered) // size)
    return batches.map(_RowsOfBatch(ordered, size, tuple(rows)))


def read(dataset: grain.MapDataset[Any], execution: ExecutionConfig) -> Iterator[Any]:
    """Reads ahead with the run's threads and worker processes."""
    return pipeline.read(
        dataset, num_threads=execution.num_threads, num_workers=execution.num_workers
    )


@dataclasses.dataclass(frozen=True, eq=False)
class ModalityOrder:
    """LLaVA's `group_by_modality_length`: batches of images and batches of text alone.

    Maps a place in an endless stream to the index of the sample there. The reference also sorts
    each global batch by length and deals it to the devices. Batches are packed here, so within a
    batch neither matters, and what is left is which samples share a batch: those of either kind are
    shuffled and cut into batches, the batches of both kinds are shuffled, and the remainders form
    the last, mixed ones. The distribution is that of the reference; the order itself depends on
    torch's generator and is not reproduced.

    Attributes:
      has_image: bool [n], of every sample.
      batch_size: global; an epoch is cut to full batches.
      seed: decides the order of every epoch.
    """

    has_image: np.ndarray
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.has_image) < self.batch_size:
            raise ValueError(
                f"{len(self.has_image)} samples do not fill one batch of {self.batch_size}"
            )

    @property
    def epoch_size(self) -> int:
        """Number of samples of an epoch."""
        return len(self.has_image) // self.batch_size * self.batch_size

    def __call__(self, place: int) -> int:
        """The sample at a place, counted over all epochs."""
        epoch, index = divmod(place, self.epoch_size)
        return int(_draw_epoch(self, epoch)[index])


@functools.lru_cache(maxsize=2)  # reading ahead touches two epochs at most
def _draw_epoch(order: ModalityOrder, epoch: int) -> np.ndarray:
    random = np.random.default_rng([order.seed, epoch])
    batches, remainders = [], []
    for kind in (order.has_image, ~order.has_image):
        indices = random.permutation(np.flatnonzero(kind))
        full = len(indices) // order.batch_size * order.batch_size
        batches.append(indices[:full].reshape(-1, order.batch_size))
        remainders.append(indices[full:])
    pure = random.permutation(np.concatenate(batches))
    mixed = random.permutation(np.concatenate(remainders))
    return np.concatenate([pure.ravel(), mixed])[: order.epoch_size]
