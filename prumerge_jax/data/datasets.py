"""The data sets that a training run can name, by `data.name`.

`llava_json` is known here; a room with another data set registers it (`register_dataset`).
"""

import fcntl
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from prumerge_jax.data import conversation, llava_json, samples
from prumerge_jax.data.images import OneOfSeveral, Shown
from prumerge_jax.data.samples import Sample
from prumerge_jax.messages import did_you_mean, quoted


@dataclass(frozen=True)
class DataConfig:
    """Which samples a run trains on.

    Attributes:
      name: a registered data set.
      directory: where prepared records are stored.
      json_file, image_folder, skip_bad_images: see `llava_json.LlavaJsonConfig`.
      options: fields that only a registered data set has.
    """

    name: str
    directory: str = "~/.cache/prumerge_jax"
    json_file: str = ""
    image_folder: str = ""
    skip_bad_images: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


class Records(NamedTuple):
    """A data set on disk.

    Attributes:
      source: random access to the stored records, images still encoded.
      has_image: bool [n], whether a record has an image.
      entries: int [n], where each stands among `Dataset.conversations`.
      to_sample: a record as a training sample.
    """

    source: Sequence[Mapping[str, Any]]
    has_image: np.ndarray
    entries: np.ndarray
    to_sample: Callable[[Mapping[str, Any]], Sample]


class Dataset(Protocol):
    """A data set that was found and checked; nothing is written before `records`.

    Attributes:
      identity: changes with the content.
      samples: upper bound of the number of records.
    """

    identity: str
    samples: int

    def records(self) -> Records:
        """The records, written below `DataConfig.directory` if they are not there yet."""
        ...

    def conversations(self) -> Iterator[Sample]:
        """The samples with an empty image file each, for what depends on the text alone."""
        ...

    def shown(self) -> Iterator[tuple[Shown | OneOfSeveral, ...]]:
        """What each of them shows, for what depends on the size of images; files need not be read
        before."""
        ...


class _Registered(NamedTuple):
    open: Callable[[DataConfig], Dataset]
    options: frozenset[str]


_DATASETS: dict[str, _Registered] = {}


def register_dataset(
    name: str, open_dataset: Callable[[DataConfig], Dataset], options: Collection[str] = ()
) -> None:
    """Makes a data set known; `options` are the names of its fields in `DataConfig.options`."""
    _DATASETS[name] = _Registered(open_dataset, frozenset(options))


def known_options() -> frozenset[str]:
    """The fields of `DataConfig.options` of all registered data sets."""
    return frozenset().union(*(registered.options for registered in _DATASETS.values()))


def open_dataset(data: DataConfig) -> Dataset:
    """Finds and checks the data set that a configuration names.

    Raises:
      ValueError: there is no data set of that name, or its samples cannot be used.
      OSError: a file cannot be read.
    """
    if data.name not in _DATASETS:
        raise ValueError(
            f"data.name is {quoted(data.name)}; expected one of {sorted(_DATASETS)}"
            + did_you_mean(data.name, _DATASETS)
        )
    return _DATASETS[data.name].open(data)


@contextmanager
def exclusive(directory: pathlib.Path) -> Iterator[None]:
    """Lets one process at a time write below a directory; the next ones find the files there."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class _LlavaJson:
    """`Dataset` of a file in LLaVA's form."""

    def __init__(self, data: DataConfig) -> None:
        self._directory = pathlib.Path(data.directory).expanduser()
        self._config = llava_json.LlavaJsonConfig(
            json_file=data.json_file,
            image_folder=data.image_folder,
            skip_bad_images=data.skip_bad_images,
        )
        self.identity = f"llava_json/{self._config.name}"
        self.samples = len(self._config.entries)

    def records(self) -> Records:
        with exclusive(self._directory):
            builder = samples.prepare(llava_json.LlavaJson, self._config, self._directory)
        has_image = np.array([conversation.has_image(entry) for entry in self._config.entries])
        skipped = llava_json.skipped_entries(builder)
        llava_json.warn_of_skipped(self._config, skipped)
        source = samples.record_source(builder, "train")
        entries = np.delete(np.arange(len(has_image)), skipped)
        return Records(source, has_image[entries], entries, samples.from_record)

    def conversations(self) -> Iterator[Sample]:
        for entry in self._config.entries:
            turns = llava_json.stored_turns(entry)
            sample: Sample = {"id": str(entry["id"]), "conversations": turns}
            if "image" in entry:
                sample["image"] = b""
            if "images" in entry:
                sample["images"] = [b""] * len(entry["images"])
            if "video" in entry:
                sample["video"] = ""
            yield sample

    def shown(self) -> Iterator[tuple[Shown | OneOfSeveral, ...]]:
        folder = pathlib.Path(self._config.image_folder)
        for entry in self._config.entries:
            located: dict[str, Any] = {
                kind: folder / entry[kind] for kind in ("image", "video") if kind in entry
            }
            if "images" in entry:
                located["images"] = [folder / name for name in entry["images"]]
            yield samples.shown(located)


register_dataset("llava_json", _LlavaJson)
