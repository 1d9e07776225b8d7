"""From a question and its image to a request: one way for the API and the evaluation.

The template, the token ids and the pixels are those that training makes of the same question.
"""

import base64
import binascii
import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from prumerge_jax.data.images import (
    ImageError,
    OneOfSeveral,
    Shown,
    Video,
    VideoFile,
    load_image,
)
from prumerge_jax.data.layout import Layout
from prumerge_jax.data.loading import Named, stream_pixels
from prumerge_jax.data.pictures import PictureProcessor
from prumerge_jax.data.templates import Template, evaluation_parts
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.data.tokens import IMAGE_PLACEHOLDER, IMAGE_TOKEN
from prumerge_jax.engine.request import (
    MAX_SEED,
    ImageInput,
    Opening,
    Request,
    SamplingParams,
)
from prumerge_jax.messages import quoted, shortened
from prumerge_jax.reductions import Reduction, keywords, spell

Images = Sequence[Shown | Sequence[Shown] | None]
"""The image of every prompt: a path, bytes, PIL image, uint8 [H, W, 3] or data URL; a `Video` or
`VideoFile`; a tuple of them where the model takes several; None asks without."""

GREEDY = SamplingParams()

_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, eq=False)
class Draft:
    """A request whose images have not been read.

    Attributes:
      key, token_ids, continuation, sampling, question_ids: see `Request`.
      images: names and sources; drafts with equal names share one image.
      layouts: of the images, where they differ from image to image; else empty.
    """

    key: int
    token_ids: np.ndarray
    images: tuple[Named, ...] = ()
    continuation: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    sampling: SamplingParams = SamplingParams()
    question_ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    layouts: tuple[Layout, ...] = ()

    @property
    def opening(self) -> Opening:
        """What the engine's shapes are fitted to."""
        token_ids = np.concatenate([self.token_ids, self.continuation])
        return Opening(token_ids, tuple(name for name, _ in self.images), self.layouts)


class RequestBuilder:
    """Makes requests for one model under one chat template.

    Args:
      tokenizer: the model's.
      template: one that asks questions.
      images: makes crops of images.
      num_workers: processes that decode images, see `stream_pixels`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        images: PictureProcessor,
        num_workers: int = 0,
    ) -> None:
        self.tokenizer, self.template, self.images = tokenizer, template, images
        self.num_workers = num_workers

    def token_ids(self, text: str, num_images: int) -> np.ndarray:
        """Ids int32 [T] of the prompt that asks `text`, the images' tokens in front of it.

        Raises:
          ValueError: more images than the model takes, a literal `<image>` in the text, text that
            is not Unicode, a template that asks nothing.
        """
        self.images.check_number(num_images, "the prompt")
        parts = evaluation_parts(self.template, text, [IMAGE_PLACEHOLDER] * num_images)
        return np.array(self.tokenizer.encode_prompt(parts), np.int32)

    def question_ids(self, text: str) -> np.ndarray:
        """Ids int32 [M] of the keywords of a question, for reductions that read them."""
        return question_ids(self.tokenizer, text)

    def drafts(
        self,
        images: Images,
        prompts: Sequence[str],
        sampling: SamplingParams = GREEDY,
    ) -> list[Draft]:
        """One draft per prompt, draft i with seed + i (modulo 2**32).

        Everything that needs no pixel is checked.

        Raises:
          ValueError: no lists, lists of different lengths, or a prompt that cannot be asked; the
            message names it.
          ImageError: an image file is missing; the message names it.
        """
        check_list(prompts, "prompts")
        check_list(images, "images")
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts; None: no image")
        drafts = []
        for key, (sources, text) in enumerate(zip(images, prompts, strict=True)):
            if not isinstance(text, str):
                raise ValueError(f"prompt {key} is {quoted(text)}; expected a string")
            self.images.check_number(_count(sources), f"prompt {key}")
            named = _images_of(sources, key)
            try:
                ids = self.token_ids(text, len(named))
            except ValueError as error:
                raise ValueError(f"prompt {key}: {error}") from error
            seed = (sampling.seed + key) % MAX_SEED
            own = dataclasses.replace(sampling, seed=seed)
            asked = self.question_ids(text)
            layouts = self.images.layouts(named)
            draft = Draft(key, ids, named, sampling=own, question_ids=asked, layouts=layouts)
            drafts.append(draft)
        return drafts

    def requests(
        self, drafts: Iterable[Draft], refuse: Callable[[int, ImageError], None] | None = None
    ) -> Iterator[Request]:
        """Requests in the order of the drafts, see `requests_of`."""
        return requests_of(drafts, self.images, refuse, num_workers=self.num_workers)


def requests_of(
    drafts: Iterable[Draft],
    processor: PictureProcessor,
    refuse: Callable[[int, ImageError], None] | None = None,
    *,
    num_workers: int = 0,
) -> Iterator[Request]:
    """Requests in the order of the drafts; images are decoded as requests are asked for.

    Args:
      drafts: what to ask.
      processor: makes crops of images.
      refuse: called with the key of a draft whose image cannot be used, and the reason. None
        raises the reason.
      num_workers: processes that decode images, see `stream_pixels`.

    Raises:
      ImageError: an image cannot be used.
    """
    drafts, ahead = itertools.tee(drafts)
    pictures = stream_pixels(
        (image for draft in ahead for image in draft.images),
        processor,
        num_workers=num_workers,
    )
    for draft in drafts:
        images: list[ImageInput] = []
        errors: list[ImageError] = []
        for (name, _), picture in zip(draft.images, pictures, strict=False):
            if isinstance(picture, ImageError):
                errors.append(picture)
            elif picture is not None:
                images.append(ImageInput(*picture, key=name))
        if errors:
            if refuse is None:
                raise errors[0]
            refuse(draft.key, errors[0])
            continue
        yield Request(
            draft.key,
            draft.token_ids,
            tuple(images),
            draft.continuation,
            draft.sampling,
            draft.question_ids,
        )


def drafts_of_ids(
    images: Images,
    token_ids: Sequence[Sequence[int] | np.ndarray],
    processor: PictureProcessor,
) -> list[Draft]:
    """Drafts of prompts that are token ids already, `IMAGE_TOKEN` (-200) where an image goes.

    Raises:
      ValueError: no lists, lists of different lengths, more images than the model takes, or other
        than one id -200 for each; the message names the prompt.
      ImageError: an image file is missing; the message names it.
    """
    check_list(images, "images")
    if len(images) != len(token_ids):
        raise ValueError(f"{len(images)} images but {len(token_ids)} lists of ids; None: no image")
    drafts = []
    for key, (sources, given) in enumerate(zip(images, token_ids, strict=True)):
        ids = np.asarray(given)
        if ids.ndim != 1 or not ids.size or ids.dtype.kind not in "iu":
            raise ValueError(f"token_ids {key} are {quoted(given)}; expected a list of integers")
        processor.check_number(_count(sources), f"prompt {key}")
        named = _images_of(sources, key)
        placeholders = int(np.count_nonzero(ids == IMAGE_TOKEN))
        if placeholders != len(named):
            raise ValueError(
                f"token_ids {key} hold {placeholders} ids {IMAGE_TOKEN} for {len(named)} images; "
                "expected one for each"
            )
        layouts = processor.layouts(named)
        # Nothing is generated, so nothing else may be long.
        sampling = SamplingParams(max_new_tokens=1)
        drafts.append(Draft(key, ids.astype(np.int32), named, sampling=sampling, layouts=layouts))
    return drafts


def question_ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Ids int32 [M] of the keywords of a question, for reductions that read them."""
    return np.array(tokenizer.encode(keywords(text)), np.int32)


def asked_ids(tokenizer: Tokenizer, question: str | None, reduction: Reduction) -> jax.Array | None:
    """Ids [1, M] of the question that a reduction reads, -1 beyond it; None where it reads none.

    Raises:
      ValueError: there is no question, or it has more keywords than the reduction reads.
    """
    most = reduction.question_tokens
    if not most:
        return None
    ids = np.zeros(0, np.int32) if question is None else question_ids(tokenizer, question)
    if not 0 < len(ids) <= most:
        raise ValueError(
            f"reduction {quoted(spell(reduction))} reads the question: expected one "
            f"whose keywords have 1 to {most} tokens, got {quoted(question)}"
        )
    return jnp.pad(jnp.array(ids, jnp.int32), (0, most - len(ids)), constant_values=-1)[None]


def continued(
    drafts: Sequence[Draft], continuations: Sequence[Sequence[object]], tokenizer: Tokenizer
) -> tuple[list[Draft], list[int]]:
    """A draft of every continuation, with keys from 0, and the key of the prompt of each.

    Args:
      drafts: the prompts.
      continuations: the texts that may follow each of them.
      tokenizer: the model's.

    Raises:
      ValueError: a continuation is no text, or empty.
    """
    found: list[Draft] = []
    prompt_of: list[int] = []
    for draft, texts in zip(drafts, continuations, strict=True):
        for text in texts:
            ids = _continuation_ids(text, draft.key, tokenizer)
            found.append(dataclasses.replace(draft, key=len(found), continuation=ids))
            prompt_of.append(draft.key)
    return found, prompt_of


def _continuation_ids(text: object, prompt: int, tokenizer: Tokenizer) -> np.ndarray:
    if not isinstance(text, str):
        raise ValueError(f"a continuation of prompt {prompt} is {quoted(text)}; expected a string")
    ids = np.array(tokenizer.encode(text), np.int32)
    if not len(ids):
        raise ValueError(f"continuation {prompt} is empty; there is nothing to score")
    return ids


def named_image(source: object, name: str) -> tuple[str, Shown]:
    """An image and what to call it in an error.

    Args:
      source: a path, bytes, PIL image, uint8 array, or a data URL (`data:image/png;base64,...`).
      name: says whose image it is; a path is added.

    Raises:
      ValueError: the source is of another type, or an URL that would have to be fetched.
    """
    if isinstance(source, str) and _URL.match(source):
        return name, _from_data_url(source, name)
    if isinstance(source, str | os.PathLike):
        return f"{name} ({shortened(os.fspath(source))})", source
    if isinstance(source, VideoFile):
        return f"{name} ({shortened(os.fspath(source.path))})", source
    if isinstance(source, bytes | Image.Image | np.ndarray | Video):
        return name, source
    raise ValueError(
        f"{name} is {quoted(source)}; expected a path, bytes, a PIL image, a uint8 array "
        "[H, W, 3] or None"
    )


def _from_data_url(url: str, name: str) -> bytes:
    head = _DATA_URL.match(url)
    if head is None:
        raise ValueError(
            f"{name} is the URL {quoted(url)}; nothing is downloaded: expected a path, bytes or "
            "'data:image/...;base64,...'"
        )
    try:
        return base64.b64decode(url[head.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name}: the data URL {quoted(url)} is not base64") from error


def check_list(values: object, name: str) -> None:
    """Raises ValueError for one value where there should be a list of them."""
    is_one = isinstance(values, str | bytes | os.PathLike | Image.Image)
    is_one |= isinstance(values, np.ndarray) and (name != "images" or values.ndim != 4)
    if is_one or not isinstance(values, Sequence | np.ndarray):
        kind = type(values).__name__
        raise ValueError(f"expected a list of {name}, got {kind} {quoted(values)}")


def _count(images: Shown | Sequence[Shown] | None) -> int:
    if isinstance(images, list | tuple):
        return len(images)
    return int(images is not None)


def _images_of(images: Shown | Sequence[Shown] | None, prompt: int) -> tuple[Named, ...]:
    """The images of a prompt; a missing file is found here."""
    if images is None:
        return ()
    if not isinstance(images, list | tuple):
        return (_existing(images, f"image {prompt}"),)  # type: ignore[arg-type]
    if len(images) == 1:
        return (_existing(images[0], f"image {prompt}"),)
    several = [
        _existing(image, f"image {index} of prompt {prompt}") for index, image in enumerate(images)
    ]
    return tuple((name, OneOfSeveral(source)) for name, source in several)


def _existing(image: Shown, name: str) -> tuple[str, Shown]:
    name, source = named_image(image, name)
    if isinstance(source, str | os.PathLike) and not os.path.isfile(source):
        load_image(source, name)  # says what is wrong with it
    if isinstance(source, VideoFile) and not os.path.exists(source.path):
        raise ImageError(f"{name}: no such file or folder; expected a video")
    return name, source
