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

import numpy as np
from PIL import Image

from prumerge_jax.data.images import ImageError, ImageProcessor, ImageSource, load_image
from prumerge_jax.data.loading import Named, stream_pixels
from prumerge_jax.data.templates import Template, evaluation_parts
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.data.tokens import IMAGE_PLACEHOLDER
from prumerge_jax.engine.request import (
    MAX_SEED,
    ImageInput,
    Request,
    SamplingParams,
    check_image_count,
)
from prumerge_jax.messages import quoted, shortened
from prumerge_jax.reductions import keywords

Images = Sequence[ImageSource | Sequence[ImageSource] | None]
"""One image per prompt: a path, bytes, PIL image, uint8 [H, W, 3] or data URL, alone or as the only
one of a tuple; None asks without."""

GREEDY = SamplingParams()

_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, eq=False)
class Draft:
    """A request whose image has not been read.

    Attributes:
      key, token_ids, continuation, sampling, question_ids: see `Request`.
      image: its name and source; drafts with equal names share one image. None means no image.
    """

    key: int
    token_ids: np.ndarray
    image: Named | None
    continuation: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    sampling: SamplingParams = SamplingParams()
    question_ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))

    @property
    def text_tokens(self) -> int:
        """Number of tokens of prompt and continuation, the image's not counted."""
        return len(self.token_ids) - (self.image is not None) + len(self.continuation)


class RequestBuilder:
    """Makes requests for one model under one chat template.

    Args:
      tokenizer: the model's.
      template: one that asks questions.
      images: makes pixels of images.
      num_workers: processes that decode images, see `stream_pixels`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        images: ImageProcessor,
        num_workers: int = 0,
    ) -> None:
        self.tokenizer, self.template, self.images = tokenizer, template, images
        self.num_workers = num_workers

    def token_ids(self, text: str, num_images: int) -> np.ndarray:
        """Ids int32 [T] of the prompt that asks `text`, the image's token in front of it.

        Raises:
          ValueError: several images, a literal `<image>` in the text, text that is not Unicode, a
            template that asks nothing.
        """
        check_image_count(num_images, "the prompt")
        parts = evaluation_parts(self.template, text, [IMAGE_PLACEHOLDER] * num_images)
        return np.array(self.tokenizer.encode_prompt(parts), np.int32)

    def question_ids(self, text: str) -> np.ndarray:
        """Ids int32 [M] of the keywords of a question, for reductions that read them."""
        return np.array(self.tokenizer.encode(keywords(text)), np.int32)

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
        for key, (image, text) in enumerate(zip(images, prompts, strict=True)):
            if not isinstance(text, str):
                raise ValueError(f"prompt {key} is {quoted(text)}; expected a string")
            named = _only_image(image, key)
            try:
                ids = self.token_ids(text, int(named is not None))
            except ValueError as error:
                raise ValueError(f"prompt {key}: {error}") from error
            seed = (sampling.seed + key) % MAX_SEED
            own = dataclasses.replace(sampling, seed=seed)
            asked = self.question_ids(text)
            drafts.append(Draft(key, ids, named, sampling=own, question_ids=asked))
        return drafts

    def requests(
        self, drafts: Iterable[Draft], refuse: Callable[[int, ImageError], None] | None = None
    ) -> Iterator[Request]:
        """Requests in the order of the drafts; images are decoded as requests are asked for.

        Args:
          drafts: what to ask.
          refuse: called with the key of a draft whose image cannot be used, and the reason. None
            raises the reason.

        Raises:
          ImageError: an image cannot be used.
        """
        drafts, ahead = itertools.tee(drafts)
        pixels = stream_pixels(
            (draft.image for draft in ahead), self.images, num_workers=self.num_workers
        )
        for draft, image in zip(drafts, pixels, strict=True):
            if isinstance(image, ImageError):
                if refuse is None:
                    raise image
                refuse(draft.key, image)
                continue
            images: tuple[ImageInput, ...] = ()
            if draft.image is not None and image is not None:
                images = (ImageInput(image[None], key=draft.image[0]),)
            yield Request(
                draft.key,
                draft.token_ids,
                images,
                draft.continuation,
                draft.sampling,
                draft.question_ids,
            )


def named_image(source: object, name: str) -> Named:
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
    if isinstance(source, bytes | Image.Image | np.ndarray):
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


def _only_image(image: ImageSource | Sequence[ImageSource] | None, prompt: int) -> Named | None:
    """The image of a prompt, if it has one; a missing file is found here."""
    if isinstance(image, list | tuple):
        check_image_count(len(image), f"prompt {prompt}")
        image = image[0] if image else None
    if image is None:
        return None
    name, source = named_image(image, f"image {prompt}")
    if isinstance(source, str | os.PathLike) and not os.path.isfile(source):
        load_image(source, name)  # says what is wrong with it
    return name, source
