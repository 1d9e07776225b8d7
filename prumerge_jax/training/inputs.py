"""The samples of a run: which data set, in which order, from where on.

A place in the data is one number, the samples used so far over all hosts. The order depends on the
seed alone, so a resumed run continues exactly where the saved one stood.
"""

import dataclasses
import fcntl
import json
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import grain
import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from prumerge_jax.data import llava_json, pipeline, samples
from prumerge_jax.data.conversation import TEMPLATES
from prumerge_jax.data.pipeline import Example
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.digits import dataset as digits_vqa
from prumerge_jax.training.grouping import ModalityOrder

# What a record of `digits_vqa` becomes, by `data.form`.
_DIGITS_FORMS: Mapping[str, Callable[[Mapping[str, Any]], samples.Sample]] = {
    "conversation": samples.from_record,
    "caption": digits_vqa.caption_sample,
    "text": digits_vqa.text_sample,
}
_FOREVER = 1 << 40  # samples; more than any run uses


class Inputs(NamedTuple):
    """The training samples of a run.

    Attributes:
      lists: (samples used, rows) -> those rows of every global batch from there on; each a list.
      samples: how many samples an epoch has.
    """

    lists: Callable[[int, Collection[int]], Iterator[list[Any]]]
    samples: int


def conversations(
    config: ml_collections.ConfigDict, tokenizer: Tokenizer, image_size: int
) -> Inputs:
    """Labelled conversations as `Example`s, for the next-token loss.

    Args:
      config: of the run; `data`, `conversation`, `image_mode`, `label_protocol`, `batch_size`,
        `group_by_modality_length`, `seed` and `run` are read.
      tokenizer: the model's.
      image_size: S of the tower.
    """
    if config.conversation not in TEMPLATES:
        raise ValueError(
            f"conversation is {config.conversation!r}; expected one of {sorted(TEMPLATES)}"
        )
    preprocess = pipeline.Preprocessor(
        tokenizer,
        TEMPLATES[config.conversation],
        image_size,
        image_mode=config.image_mode,
        protocol=config.label_protocol,
    )
    source = record_source(config.data)
    to_sample: Callable[[Mapping[str, Any]], samples.Sample] = samples.from_record
    if config.data.name == "digits_vqa":
        to_sample = _DIGITS_FORMS[config.data.form]
    dataset = pipeline.examples(source, preprocess, to_sample=to_sample)
    order = None
    if config.group_by_modality_length:
        order = ModalityOrder(_has_image(config.data), config.batch_size, config.seed)

    def lists(used: int, rows: Collection[int]) -> Iterator[list[Example]]:
        if order is None:
            ordered = pipeline.stream(dataset, seed=config.seed, start=used)
        else:
            ordered = grain.MapDataset.range(_FOREVER)[used:].map(order).map(dataset.__getitem__)
        return read(rows_of_batches(ordered, config.batch_size, rows), config)

    return Inputs(lists, len(source) if order is None else order.epoch_size)


def record_source(data: ml_collections.ConfigDict) -> Sequence[dict[str, Any]]:
    """The training split that `config.data` names, written below `data.directory` if need be.

    Raises:
      ValueError: there is no data set of that name.
    """
    builder: type[tfds.core.GeneratorBasedBuilder]
    source: tfds.core.BuilderConfig
    if data.name == "digits_vqa":
        if data.form not in _DIGITS_FORMS:
            raise ValueError(f"data.form is {data.form!r}; expected one of {list(_DIGITS_FORMS)}")
        builder = digits_vqa.DigitsVqa
        source = digits_vqa.DigitsVqaConfig(
            train_scenes=data.train_scenes,
            validation_scenes=data.validation_scenes,
            test_scenes=data.test_scenes,
            questions_per_family=data.questions_per_family,
            scenes_per_layout=data.scenes_per_layout,
            seed=data.seed,
        )
    elif data.name == "llava_json":
        builder = llava_json.LlavaJson
        source = llava_json.LlavaJsonConfig(
            json_file=data.json_file, image_folder=data.image_folder
        )
    else:
        raise ValueError(f"data.name is {data.name!r}; expected 'digits_vqa' or 'llava_json'")
    directory = pathlib.Path(data.directory).expanduser()
    with _locked(directory):
        prepared = samples.prepare(builder, source, directory)
    return samples.record_source(prepared, "train")


@dataclasses.dataclass(frozen=True, eq=False)
class _RowsOfBatch:
    """Picks `rows` out of every `size` elements of a data set."""

    dataset: grain.MapDataset[Any]
    size: int
    rows: tuple[int, ...]

    def __call__(self, batch: int) -> list[Any]:
        return [self.dataset[batch * self.size + row] for row in self.rows]


def rows_of_batches(
    ordered: grain.MapDataset[Any], size: int, rows: Collection[int]
) -> grain.MapDataset[list[Any]]:
    """These rows of every batch of `size` elements; the other elements are never made."""
    batches = grain.MapDataset.range(len(ordered) // size)
    return batches.map(_RowsOfBatch(ordered, size, tuple(rows)))


def read(dataset: grain.MapDataset[Any], config: ml_collections.ConfigDict) -> Iterator[Any]:
    """Reads ahead with the run's threads and worker processes."""
    return pipeline.read(
        dataset, num_threads=config.run.num_threads, num_workers=config.run.num_workers
    )


@contextmanager
def _locked(directory: pathlib.Path) -> Iterator[None]:
    """Lets one process at a time prepare data below a directory; the next ones find it there."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _has_image(data: ml_collections.ConfigDict) -> np.ndarray:
    if data.name != "llava_json":
        raise ValueError(
            f"group_by_modality_length needs data.name='llava_json', not {data.name!r}"
        )
    entries = json.loads(pathlib.Path(data.json_file).read_bytes())
    return np.array(["image" in entry for entry in entries])
