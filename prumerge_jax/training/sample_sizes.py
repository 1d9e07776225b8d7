"""How large the samples of a data set are: counted once, and stored with its records."""

import dataclasses
import hashlib
import json
import logging
import pathlib
from collections.abc import Collection
from typing import Any

import numpy as np

from prumerge_jax.data.datasets import Dataset, exclusive
from prumerge_jax.data.images import OneOfSeveral, Shown
from prumerge_jax.data.loading import in_threads
from prumerge_jax.data.pictures import PictureProcessor
from prumerge_jax.data.pipeline import Preprocessor
from prumerge_jax.data.tokens import IGNORE, IMAGE_TOKEN
from prumerge_jax.messages import quoted
from prumerge_jax.store.atomic import write_atomically
from prumerge_jax.training.config import TrainConfig

_logger = logging.getLogger(__name__)

_NAMED = 5  # samples whose ids a warning gives
_OPENED_AT_ONCE = 1024  # samples


def kept_tokens(token_ids: np.ndarray, visual_tokens: int | np.ndarray, length: int) -> int:
    """Number of leading tokens of a sample that fit into `length` once its image is inserted.

    LLaVA cuts at the same place; fewer visual tokens leave room for more text. An image that would
    not fit completely is dropped, with all that follows it.

    Args:
      token_ids: int32 [T], with `IMAGE_TOKEN` (-200) where the image's tokens go.
      visual_tokens: tokens of an image, or int [images] of each.
      length: row length.
    """
    widths = np.ones(token_ids.shape, np.int64)
    widths[token_ids == IMAGE_TOKEN] = visual_tokens
    ends = np.cumsum(widths)
    return int(np.searchsorted(ends, length, side="right"))


def check_targets(
    config: TrainConfig, dataset: Dataset, preprocess: Preprocessor, fewest_visual_tokens: int
) -> np.ndarray:
    """Tokens of text of every sample, int [samples]; warns of those that teach nothing.

    These are samples without a labelled answer, and samples whose labels are all cut off. The
    outcome is stored with the records, since it takes about a millisecond per sample.

    Args:
      config: configuration of the run.
      dataset: the samples.
      preprocess: says which tokens are labelled.
      fewest_visual_tokens: lower bound of the tokens of an image; a sample that only a larger
        number pushes over the row's end is not found here.

    Raises:
      ValueError: no sample has anything to learn.
    """
    key = [
        dataset.identity, preprocess.tokenizer.sha256(), preprocess.tokenizer.style,
        config.conversation, config.label_protocol, config.row_length, fewest_visual_tokens,
    ]  # fmt: skip
    file = _file_of(config, "targets", key)
    found = _stored(file, ("sizes", "without", "first"))
    if found is None:
        found = _count_targets(dataset, preprocess, fewest_visual_tokens)
        if found["without"] == len(found["sizes"]):
            raise ValueError(
                f"none of the {len(found['sizes'])} samples has anything to learn (the first are "
                f"{', '.join(found['first'])}): {_CAUSES}"
            )
        _store(file, found)
    if found["without"]:
        _logger.warning(
            "%d of %d samples have nothing to learn (the first are %s): %s",
            found["without"], len(found["sizes"]), ", ".join(found["first"]), _CAUSES,
        )  # fmt: skip
    return np.array(found["sizes"], int)


def unreduced_tokens(
    config: TrainConfig, dataset: Dataset, processor: PictureProcessor
) -> np.ndarray:
    """Visual tokens of every sample where nothing is reduced, int [samples]; of images by their
    headers.

    Args:
      config: configuration of the run.
      dataset: the samples.
      processor: says what an image is cut into. One whose header cannot be read is one crop.
    """
    file = _file_of(config, "visual", [dataset.identity, dataclasses.asdict(processor)])
    found = _stored(file, ("tokens",))
    if found is None:
        _logger.info("counting the visual tokens of %d samples, once", dataset.samples)

        def tokens(shown: tuple[Shown | OneOfSeveral, ...]) -> int:
            layouts = processor.layouts(("", each) for each in shown)
            one = config.sizes.vision.num_patches
            return sum(layout.span for layout in layouts) if layouts else one * len(shown)

        found = {"tokens": list(in_threads(tokens, dataset.shown(), at_once=_OPENED_AT_ONCE))}
        _store(file, found)
    return np.array(found["tokens"], int)


_CAUSES = (
    "their answers are empty or cut off by max_length, the conversation ends with the human, or "
    "its rounds do not add up (a role's name inside an answer, another tokenizer_style)"
)


def _file_of(config: TrainConfig, kind: str, key: list[Any]) -> pathlib.Path:
    """Where something that was counted is stored, by all that it depends on."""
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return pathlib.Path(config.data.directory).expanduser() / kind / f"{name}.json"


def _stored(file: pathlib.Path, names: Collection[str]) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_text())
        return {name: found[name] for name in names}
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there yet, or damaged: count again


def _store(file: pathlib.Path, found: dict[str, Any]) -> None:
    with exclusive(file.parent):
        write_atomically(file, json.dumps(found).encode())


def _count_targets(
    dataset: Dataset, preprocess: Preprocessor, fewest_visual_tokens: int
) -> dict[str, Any]:
    """The samples' tokens of text, how many of them have no target, and the ids of the first."""
    _logger.info("counting what can be learned in %d samples, once", dataset.samples)
    without = 0
    first: list[str] = []
    sizes: list[int] = []
    for sample in dataset.conversations():
        text = preprocess.label(sample)
        kept = kept_tokens(text.ids, fewest_visual_tokens, preprocess.max_length)
        sizes.append(text.ids.size)
        if not (text.labels[1:kept] != IGNORE).any():
            without += 1
            if len(first) < _NAMED:
                first.append(quoted(sample["id"], 40))
    return {"sizes": sizes, "without": without, "first": first}
