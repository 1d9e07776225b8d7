"""The data set `llava_json`: any fine-tuning file in LLaVA's form with its image folder.

The file is a JSON list of `{"id", "image" (optional, relative to the folder), "conversations"}`;
`image` is left out where a sample is text alone. All samples are checked before the first record
is written. Picture files are stored byte for byte; nothing is decoded or resized.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from prumerge_jax.data import conversation, images, samples
from prumerge_jax.data.tokens import IMAGE_PLACEHOLDER

_ERRORS_SHOWN = 10


@dataclasses.dataclass(eq=False)
class LlavaJsonConfig(tfds.core.BuilderConfig):
    """The source of a data set. Its name ends in a hash of the file, so an edited file is re-read.

    Attributes:
      json_file: the list of samples.
      image_folder: where the samples' `image` paths start.
    """

    name: str = ""
    json_file: str = ""
    image_folder: str = ""

    def __post_init__(self) -> None:
        path = pathlib.Path(self.json_file)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; json_file must name a LLaVA JSON file")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        self.name = f"{path.stem}-{digest[:12]}"


class LlavaJson(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `llava_json`, with the one split `train` in the order of the file."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Tensor(shape=(), dtype=np.object_),
                    "conversations": samples.conversation_feature(),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        config = self.builder_config
        folder = pathlib.Path(config.image_folder)
        entries = read_checked(pathlib.Path(config.json_file), folder)
        return {"train": self._generate_examples(entries, folder)}

    def _generate_examples(
        self, entries: list[dict[str, Any]], folder: pathlib.Path
    ) -> Iterator[tuple[int, dict]]:
        for index, entry in enumerate(entries):
            yield index, _record(entry, folder)


def read_checked(json_file: pathlib.Path, image_folder: pathlib.Path) -> list[dict[str, Any]]:
    """Reads a LLaVA JSON file and checks every sample; pictures are looked up, not decoded.

    Raises:
      ValueError: the file is not a JSON list, or samples are faulty. The message names up to ten
        faulty samples by id, with what is wrong, and says how many there are.
    """
    with json_file.open(encoding="utf-8") as file:
        try:
            entries = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{json_file}: not a JSON file: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{json_file}: expected a JSON list with at least one sample")
    faults = []
    for index, entry in enumerate(entries):
        fault = _fault(entry, image_folder)
        if fault:
            faults.append(f"entry {index}: {fault}")
    if faults:
        more = f"\n… and {len(faults) - _ERRORS_SHOWN} more" if len(faults) > _ERRORS_SHOWN else ""
        raise ValueError(
            f"{json_file}: {len(faults)} of {len(entries)} samples cannot be used; correct or "
            "remove them:\n" + "\n".join(faults[:_ERRORS_SHOWN]) + more
        )
    return entries


def _record(entry: Mapping[str, Any], image_folder: pathlib.Path) -> dict[str, Any]:
    image = b""
    if "image" in entry:
        image = _read_image(image_folder / entry["image"], entry["id"])
    turns = [{"from": turn["from"], "value": turn["value"]} for turn in entry["conversations"]]
    return {"id": str(entry["id"]), "image": image, "conversations": turns}


def _fault(entry: Any, image_folder: pathlib.Path) -> str | None:
    """What is wrong with a sample, or None."""
    if not isinstance(entry, Mapping) or "id" not in entry:
        return "expected an object with id, conversations and optionally image"
    try:
        turns = conversation.sample_turns(entry)
    except conversation.SampleError as error:
        return str(error)
    name = f"sample {entry['id']!r}"
    if len(turns) < 2:
        return f"{name}: a question without an answer; expected at least one turn of human and gpt"
    if "image" not in entry:
        # To the reference these are plain characters; far more often the picture was forgotten.
        if any(IMAGE_PLACEHOLDER in turn for turn in turns):
            return f"{name}: {IMAGE_PLACEHOLDER} in a text without picture; expected an image path"
        return None
    if any(IMAGE_PLACEHOLDER in answer for answer in turns[1::2]):
        return f"{name}: {IMAGE_PLACEHOLDER} stands in an answer; expected it in a turn of human"
    fault = _image_fault(entry["image"], image_folder)
    return fault and f"{name}: {fault}"


def _image_fault(image: Any, image_folder: pathlib.Path) -> str | None:
    if not isinstance(image, str) or not image:
        return f"image is {image!r}; expected a path, or no image key for text alone"
    path = pathlib.PurePosixPath(image)
    if path.is_absolute() or ".." in path.parts:
        return f"image {image!r} leads out of the image folder; expected a path below it"
    file = image_folder / path
    if not file.is_file():
        return f"no image file {file}; expected it below image_folder"
    if not file.stat().st_size:
        return f"the image file {file} is empty"
    return None


def _read_image(file: pathlib.Path, sample_id: Any) -> bytes:
    """The file's bytes, once its header is that of a picture; the pixels are not decoded here."""
    content = file.read_bytes()
    try:
        Image.open(io.BytesIO(content), formats=images.FORMATS).close()
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"sample {sample_id!r}: {file} is no {', '.join(images.FORMATS)} picture: {error}"
        ) from error
    return content
