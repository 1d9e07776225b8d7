"""Training samples in LLaVA's form: how every data set of the package stores and reads them."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypedDict

import tensorflow_datasets as tfds

from prumerge_jax.data.images import OneOfSeveral, Shown, VideoFile

Turn = TypedDict("Turn", {"from": str, "value": str})
"""One turn of a conversation; `from` is `human` or `gpt`."""


class Sample(TypedDict):
    """An entry of LLaVA's data file with the encoded image file in place of its path.

    Several images, or a video, are in place of the image; the video as the path of its file or
    folder of frames, which is read when it is shown.
    """

    id: str
    image: NotRequired[bytes]
    images: NotRequired[list[bytes]]
    video: NotRequired[str]
    conversations: list[Turn]


def shown(sample: Mapping[str, Any]) -> tuple[Shown | OneOfSeveral, ...]:
    """The images of a `Sample`, or its video, in the order of their tokens; files may be paths."""
    if "video" in sample:
        return (VideoFile(sample["video"]),)
    if "images" in sample:
        return tuple(map(OneOfSeveral, sample["images"]))
    return (sample["image"],) if "image" in sample else ()


def conversation_feature() -> tfds.features.Sequence:
    """How a data set stores the conversation of a sample."""
    return tfds.features.Sequence({"from": tfds.features.Text(), "value": tfds.features.Text()})


def from_record(record: Mapping[str, Any]) -> Sample:
    """Reads a stored record: text is bytes, `image` an undecoded file, empty when there is none;
    `images` and `video`, where a data set has them, likewise."""
    stored = record["conversations"]
    turns: list[Turn] = [
        {"from": role.decode(), "value": value.decode()}
        for role, value in zip(stored["from"], stored["value"], strict=True)
    ]
    sample: Sample = {"id": record["id"].decode(), "conversations": turns}
    if record["image"]:
        sample["image"] = record["image"]
    if len(several := record.get("images", ())):
        sample["images"] = [bytes(image) for image in several]
    if video := record.get("video", b""):
        sample["video"] = video.decode()
    return sample


def prepare(
    builder_class: type[tfds.core.GeneratorBasedBuilder],
    config: tfds.core.BuilderConfig,
    data_dir: str | os.PathLike[str],
) -> tfds.core.GeneratorBasedBuilder:
    """Writes a data set as ArrayRecord files below `data_dir`, unless it is there already."""
    builder = builder_class(config=config, data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return builder


def record_source(builder: tfds.core.GeneratorBasedBuilder, split: str) -> Sequence[dict[str, Any]]:
    """Random access to the records of a prepared split, images still encoded."""
    return builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
