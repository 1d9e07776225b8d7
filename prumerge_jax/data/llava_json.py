"""The data set `llava_json`: any fine-tuning file in LLaVA's form with its image folder.

The file is a JSON list of `{"id", "image" (optional, relative to the folder), "conversations"}`;
`image` is left out where a sample is text alone, and a list where a sample has several. `video` in
its place is a video file, or a folder of frames. All samples are checked before the first record is
written, and every image is decoded once while the records are written. Image files are stored byte
for byte, not resized; videos stay where they are, and are read when they are shown.
"""

import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from prumerge_jax.data import conversation, images, samples
from prumerge_jax.data.loading import in_threads
from prumerge_jax.data.samples import Turn
from prumerge_jax.data.tokens import IMAGE_PLACEHOLDER
from prumerge_jax.messages import quoted

_logger = logging.getLogger(__name__)

_ERRORS_SHOWN = 10
_FAULT_LENGTH = 400  # characters
_DECODED_AT_ONCE = 256  # images


@dataclasses.dataclass(eq=False)
class LlavaJsonConfig(tfds.core.BuilderConfig):
    """The source of a data set.

    Its name ends in a hash of the file, the folder's path and the size and time of every image, so
    whatever is edited, replaced or repaired is read again.

    Attributes:
      json_file: the list of samples.
      image_folder: directory that the samples' `image` paths are relative to.
      skip_bad_images: leaves out samples whose image cannot be decoded, instead of refusing all.
      entries: the checked content of the file; set here.

    Raises:
      FileNotFoundError: there is no such file or folder.
      ValueError: as `read_checked`.
    """

    name: str = ""
    json_file: str = ""
    image_folder: str = ""
    skip_bad_images: bool = False
    entries: list[dict[str, Any]] = dataclasses.field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if not self.json_file:
            raise ValueError("data.json_file is not set; expected the path of a LLaVA JSON file")
        file, folder = pathlib.Path(self.json_file), pathlib.Path(self.image_folder)
        self.entries = read_checked(file, folder)
        digest = hashlib.sha256(read_regular(file))
        digest.update(os.fsencode(folder.resolve()) + bytes([self.skip_bad_images]))
        for entry in self.entries:
            for name in shown_files(entry):
                status = os.stat(folder / name)
                digest.update(b"%d %d;" % (status.st_size, status.st_mtime_ns))
        self.name = f"{file.stem[:40]}-{digest.hexdigest()[:12]}"


class LlavaJson(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of `llava_json`, with the one split `train` in the order of the file."""

    VERSION = tfds.core.Version("3.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Tensor(shape=(), dtype=np.object_),
                    "images": tfds.features.Sequence(
                        tfds.features.Tensor(shape=(), dtype=np.object_)
                    ),
                    "video": tfds.features.Text(),
                    "conversations": samples.conversation_feature(),
                }
            ),
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        config = self.builder_config
        folder = pathlib.Path(config.image_folder)
        faults: dict[int, str] = {}
        stored = 0
        for index, read in enumerate(_read_images(config.entries, folder)):
            if isinstance(read, images.ImageError):
                faults[index] = _cut(str(read))
            elif not faults or config.skip_bad_images:
                yield stored, _record(config.entries[index], read, folder)
                stored += 1
        if faults and (not config.skip_bad_images or not stored):
            raise ValueError(
                f"{config.json_file}: {len(faults)} of {len(config.entries)} samples have an "
                "image that cannot be used; repair or remove them"
                + ("" if config.skip_bad_images else ", or set data.skip_bad_images=true")
                + ":\n"
                + _shown(list(faults.values()))
            )
        for fault in faults.values():
            _logger.warning("left out: %s", fault)
        self.info.metadata["skipped"] = sorted(faults)


def skipped_entries(builder: tfds.core.DatasetBuilder) -> list[int]:
    """Indices of the entries that a prepared data set leaves out."""
    return list(builder.info.metadata["skipped"])


def warn_of_skipped(config: LlavaJsonConfig, skipped: Sequence[int]) -> None:
    """Logs how many samples are left out for their images, and the first of them."""
    if skipped:
        ids = ", ".join(quoted(config.entries[index]["id"], 40) for index in skipped[:5])
        _logger.warning(
            "%d of %d samples are left out, as their images cannot be decoded (%s%s)",
            len(skipped), len(config.entries), ids, ", …" if len(skipped) > 5 else "",
        )  # fmt: skip


def read_checked(json_file: pathlib.Path, image_folder: pathlib.Path) -> list[dict[str, Any]]:
    """Reads a LLaVA JSON file and checks every sample; images are looked up, not decoded.

    Raises:
      FileNotFoundError: there is no such file, or no such folder though samples have images.
      ValueError: the file is not a JSON list in UTF-8, or samples are faulty. The message names
        up to ten faulty samples by id, with what is wrong, and says how many there are.
    """
    entries = _read_json(json_file)
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{json_file}: expected a JSON list with at least one sample")
    entries = [_with_images(entry) for entry in entries]
    if any(isinstance(entry, Mapping) and conversation.has_image(entry) for entry in entries):
        if image_folder == pathlib.Path():
            raise ValueError(
                f"data.image_folder is not set, but samples of {json_file} have images"
            )
        if not image_folder.is_dir():
            raise FileNotFoundError(f"{image_folder}: no such directory; it is data.image_folder")
    faults = []
    for index, entry in enumerate(entries):
        fault = _fault(entry, image_folder)
        if fault:
            faults.append(_cut(f"entry {index}: {fault}"))
    if faults:
        raise ValueError(
            f"{json_file}: {len(faults)} of {len(entries)} samples cannot be used; correct or "
            "remove them:\n" + _shown(faults)
        )
    return entries


def shown_files(entry: Mapping[str, Any]) -> list[str]:
    """The image files of a checked entry, or its video, relative to the folder."""
    if "images" in entry:
        return list(entry["images"])
    return [entry[name] for name in ("image", "video") if name in entry]


def _with_images(entry: Any) -> Any:
    """An entry whose `image` is a list with `images` in its place; a list of one is that image."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("image"), list):
        return entry
    rest = {name: value for name, value in entry.items() if name != "image"}
    listed = entry["image"]
    return {**rest, "image": listed[0]} if len(listed) == 1 else {**rest, "images": listed}


def stored_turns(entry: Mapping[str, Any]) -> list[Turn]:
    """The conversation of a checked entry, without fields that are not LLaVA's."""
    return [{"from": turn["from"], "value": turn["value"]} for turn in entry["conversations"]]


def read_regular(file: pathlib.Path) -> bytes:
    """The content of a regular file; a pipe or device, whose read may never end, is refused.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not a regular file.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    with open(descriptor, "rb") as opened:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"{file} is not a regular file")
        return opened.read()


def _read_json(file: pathlib.Path) -> Any:
    content = read_regular(file)
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{file}: byte {error.start} (line {line}) is not UTF-8; convert the file, for example "
            "with iconv -f latin1 -t utf-8"
        ) from None
    except RecursionError:
        raise ValueError(f"{file}: nested too deeply for a list of samples") from None
    except ValueError as error:
        raise ValueError(f"{file}: not a JSON file: {error}") from None


def _shown(faults: Sequence[str]) -> str:
    more = f"\n… and {len(faults) - _ERRORS_SHOWN} more" if len(faults) > _ERRORS_SHOWN else ""
    return "\n".join(faults[:_ERRORS_SHOWN]) + more


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _FAULT_LENGTH else f"{text[: _FAULT_LENGTH - 1]}…"


def _record(
    entry: Mapping[str, Any], read: Sequence[bytes], folder: pathlib.Path
) -> dict[str, Any]:
    return {
        "id": str(entry["id"]),
        "image": read[0] if "image" in entry else b"",
        "images": list(read) if "images" in entry else [],
        "video": str((folder / entry["video"]).resolve()) if "video" in entry else "",
        "conversations": stored_turns(entry),
    }


def _fault(entry: Any, image_folder: pathlib.Path) -> str | None:
    """What is wrong with a sample, or None."""
    if not isinstance(entry, Mapping) or "id" not in entry:
        return "expected an object with id, conversations and optionally image"
    if not isinstance(entry["id"], str | int):
        return f"id is {quoted(entry['id'])}; expected a string or an integer"
    name = f"sample {quoted(entry['id'])}"
    try:
        turns = conversation.sample_turns(entry)
    except conversation.SampleError as error:
        return str(error)
    if len(turns) < 2:
        return f"{name}: a question without an answer; expected at least one turn of human and gpt"
    shown = [str(entry.get(name, "")) for name in ("image", "images", "video")]
    for text in (str(entry["id"]), *shown, *turns):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            return (
                f"{name}: half of a surrogate pair (\\u{ord(text[error.start]):04x}) in "
                f"{quoted(text)}; expected valid Unicode"
            )
    if not conversation.has_image(entry):
        # To the reference these are plain characters; far more often the image was forgotten.
        if any(IMAGE_PLACEHOLDER in turn for turn in turns):
            return f"{name}: {IMAGE_PLACEHOLDER} in a text without image; expected an image path"
        return None
    if any(IMAGE_PLACEHOLDER in answer for answer in turns[1::2]):
        return f"{name}: {IMAGE_PLACEHOLDER} appears in an answer; expected it in a turn of human"
    if "video" in entry:
        fault = _video_fault(entry["video"], image_folder)
        return fault and f"{name}: {fault}"
    given = entry["images"] if "images" in entry else [entry["image"]]
    faults = (_image_fault(image, image_folder) for image in given)
    fault = next((each for each in faults if each), None)
    return fault and f"{name}: {fault}"


def _path_fault(path: Any, kind: str, hint: str = "") -> str | None:
    """Why this is no path below the image folder, or None; `hint` ends what was expected."""
    if not isinstance(path, str) or not path:
        return f"{kind} is {quoted(path)}; expected a path{hint}"
    parts = pathlib.PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts:
        return f"{kind} {quoted(path)} leads out of the image folder; expected a path below it"
    return None


def _video_fault(video: Any, image_folder: pathlib.Path) -> str | None:
    fault = _path_fault(video, "video")
    if fault or (image_folder / video).exists():
        return fault
    return f"no video {quoted(str(image_folder / video), 200)}; expected it below image_folder"


def _image_fault(image: Any, image_folder: pathlib.Path) -> str | None:
    if fault := _path_fault(image, "image", ", or no image key for text alone"):
        return fault
    file = image_folder / image
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return f"no image file {quoted(str(file), 200)}; expected it below image_folder"
    if not stat.S_ISREG(status.st_mode):
        return f"{quoted(str(file), 200)} is not a regular file; expected an image"
    if not status.st_size:
        return f"the image file {file} is empty"
    return None


def _read_images(
    entries: Sequence[Mapping[str, Any]], folder: pathlib.Path
) -> Iterator[list[bytes] | images.ImageError]:
    """The encoded images of every entry, none of text alone and of a video, or why one cannot be
    decoded."""

    def read(entry: Mapping[str, Any]) -> list[bytes] | images.ImageError:
        contents = []
        for path in [] if "video" in entry else shown_files(entry):
            name = f"sample {quoted(entry['id'])}: {folder / path}"
            try:
                contents.append(read_regular(folder / path))
                images.load_image(contents[-1], name)
            except images.ImageError as error:
                return error
            except (OSError, ValueError) as error:
                return images.ImageError(f"{name}: {error}")
        return contents

    return in_threads(read, entries, at_once=_DECODED_AT_ONCE)
