"""Reading training samples: shuffled, shared out over hosts, resumable, decoded in the background.

A training run composes four steps::

    source = samples.record_source(builder, "train")
    processor = ImageProcessor(336, vision.pixel_mean)
    dataset = examples(source, Preprocessor(tokenizer, template, processor))
    dataset = grouped(stream(dataset, seed=0, epochs=1), 16)  # lists of 16, for packing
    iterator = read(dataset)

Everything is random access until `read`, so a position in the stream is one number.
"""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from prumerge_jax.data import samples
from prumerge_jax.data.conversation import (
    LabelledText,
    LabelProtocol,
    has_image,
    label_mask,
)
from prumerge_jax.data.images import ImageProcessor
from prumerge_jax.data.pictures import Picture, PictureProcessor
from prumerge_jax.data.samples import Sample
from prumerge_jax.data.templates import Template
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.messages import quoted

_GRACE = 0.5  # seconds


@dataclasses.dataclass(frozen=True, eq=False)
class Example:
    """One sample ready for packing.

    Attributes:
      id: name of the sample.
      pixels: uint8 [S, S, 3], all zero for text alone.
      has_image: whether `pixels` shows anything.
      token_ids: int32 [T], BOS first, `IMAGE_TOKEN` (-200) where the image's tokens go.
      labels: int32 [T], the token itself where it is learned and -100 elsewhere.
      mismatch: the sample's rounds did not add up, so nothing of it is learned; to be counted.
      pictures: crops of every image and frames of every video, in the order of their tokens, of
        models that take more than one crop; `pixels` then has no side.
    """

    id: str
    pixels: np.ndarray
    has_image: bool
    token_ids: np.ndarray
    labels: np.ndarray
    mismatch: bool
    pictures: tuple[Picture, ...] = ()


@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """Makes examples of samples: decodes and resizes the image, tokenises and labels the text.

    Nothing is truncated here: how much text fits depends on the visual tokens.

    Attributes:
      tokenizer: its style says how `</s>` between rounds is read.
      template: one with a training form, such as `vicuna_v1` or `plain`.
      processor: from image files to the tower's pixels, or to pictures.
      protocol: whose rule of label lengths.
      max_length: tokens that a sample is later cut to; a longer one is not checked for mismatch.
    """

    tokenizer: Tokenizer
    template: Template
    processor: ImageProcessor | PictureProcessor
    protocol: LabelProtocol = "prumerge"
    max_length: int = 2048

    def __call__(self, sample: Sample) -> Example:
        """The example of a sample.

        Raises:
          SampleError: the conversation breaks LLaVA's format; the message names the sample.
          ImageError: the image cannot be used; the message names the sample.
        """
        text = self.label(sample)
        pixels = np.zeros((0, 0, 3), np.uint8)
        pictures: tuple[Picture, ...] = ()
        name = f"image of sample {quoted(sample['id'])}"
        if isinstance(self.processor, PictureProcessor):
            pictures = self._pictures(self.processor, sample)
        elif "image" in sample:
            pixels = self.processor(sample["image"], name)
        else:
            size = self.processor.image_size
            pixels = np.zeros((size, size, 3), np.uint8)
        return Example(
            id=sample["id"],
            pixels=pixels,
            has_image=has_image(sample),
            token_ids=text.ids,
            labels=text.labels,
            mismatch=text.mismatch,
            pictures=pictures,
        )

    def _pictures(self, processor: PictureProcessor, sample: Sample) -> tuple[Picture, ...]:
        """Crops of a sample's images, or the frames of its video."""
        kind = "video" if "video" in sample else "image"
        several = "images" in sample
        return tuple(
            processor(source, f"{kind}{f' {number}' * several} of sample {quoted(sample['id'])}")
            for number, source in enumerate(samples.shown(sample))
        )

    def label(self, sample: Sample) -> LabelledText:
        """Token ids and labels alone; the image file is not read."""
        return label_mask(
            self.tokenizer, sample, self.template, self.protocol, max_length=self.max_length
        )


def examples(
    source: Sequence[Mapping[str, Any]],
    preprocess: Callable[[Sample], Example],
    *,
    to_sample: Callable[[Mapping[str, Any]], Sample] = samples.from_record,
) -> grain.MapDataset[Example]:
    """All records of a split as examples, in stored order; work is done when one is asked for.

    Args:
      source: what `samples.record_source` returns.
      preprocess: makes an example of a sample; must be picklable for worker processes.
      to_sample: reads a record.
    """
    return grain.MapDataset.source(source).map(to_sample).map(preprocess)


def grouped(dataset: grain.MapDataset[Any], size: int) -> grain.MapDataset[list[Any]]:
    """Lists of `size` elements in order; an incomplete last list is left out.

    After `stream` the lists are batches. Before it they are units to be kept together, such as the
    scenes of one layout for contrastive training.
    """
    return dataset.batch(size, drop_remainder=True, batch_fn=list)


def stream(
    dataset: grain.MapDataset[Any],
    *,
    seed: int,
    epochs: int | None = None,
    start: int = 0,
) -> grain.MapDataset[Any]:
    """The elements of several epochs, each in a different random order, which the seed decides.

    Args:
      dataset: the elements of one epoch; finite.
      seed: decides every epoch's order.
      epochs: how often each element comes; None for endless.
      start: number of elements that have been used already.

    Raises:
      ValueError: nothing is left after `start`, or it is negative.
    """
    ordered = dataset.shuffle(seed).repeat(epochs)
    if not 0 <= start < len(ordered):
        raise ValueError(
            f"start is {start} of {len(ordered)} elements; expected 0 to {len(ordered) - 1}"
        )
    return ordered[start:]


def read(
    dataset: grain.MapDataset[Any], *, num_threads: int = 2, num_workers: int = 0
) -> grain.DatasetIterator[Any]:
    """An iterator that prepares elements ahead, in order; `get_state`, `set_state` resume it.

    Worker processes need absl's flags parsed, as `absl.app.run` does.

    Args:
      dataset: usually batches.
      num_threads: readers in this process, or in each worker process.
      num_workers: worker processes, for images that take long to decode; 0 for none. A state
        fits an iterator with the same number only.
    """
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=4 * num_threads)
    iterable = dataset.to_iter_dataset(options)
    if num_workers:
        iterable = iterable.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
        _end_workers_soon()
    return iter(iterable)


def _end_workers_soon() -> None:
    """Has grain kill workers that have not ended `_GRACE` seconds after they were asked to.

    It waits 25 s, for one after the other. None of ours ends by itself: the batches that it has
    read do not fit into its pipe, and nobody takes them out any more.
    """
    transformations = "grain._src.python.dataset.transformations"
    module = sys.modules.get(f"{transformations}.process_prefetch")
    if hasattr(module, "_PROCESS_KILL_TIMEOUT_S"):
        setattr(module, "_PROCESS_KILL_TIMEOUT_S", _GRACE)  # noqa: B010, no public name
