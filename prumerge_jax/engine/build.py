"""From a question and its image to a request: one way for the API and the evaluation.

The template, the token ids and the pixels are those that training makes of the same question.
"""

import base64
import binascii
import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from PIL import Image

from prumerge_jax.data.conversation import Template, evaluation_prompt
from prumerge_jax.data.images import ImageError, ImageProcessor
from prumerge_jax.data.loading import Named, stream_pixels
from prumerge_jax.data.tokenizer import Tokenizer
from prumerge_jax.engine.request import ImageInput, Request, SamplingParams, check_image_count
from prumerge_jax.store.messages import quoted, shortened

_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
_URL = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, eq=False)
class Draft:
    """A request whose image has not been read.

    Attributes:
      key, token_ids, continuation, sampling: see `Request`.
      image: its name and source; drafts with equal names share one image. None is no image.
    """

    key: int
    token_ids: np.ndarray
    image: Named | None
    continuation: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    sampling: SamplingParams = SamplingParams()

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
        """int32 [T] of the prompt that asks `text`, the image's token in front of it.

        Raises:
          ValueError: several images, a literal `<image>` in the text, text that is no Unicode, or a
            template that asks nothing.
        """
        check_image_count(num_images, "the prompt")
        prompt = evaluation_prompt(self.template, text, has_image=num_images > 0)
        return np.array(self.tokenizer.encode_prompt(prompt), np.int32)

    def requests(
        self, drafts: Iterable[Draft], refuse: Callable[[int, ImageError], None]
    ) -> Iterator[Request]:
        """Requests in the order of the drafts; images are decoded as requests are asked for.

        Args:
          drafts: what to ask.
          refuse: called with the key of a draft whose image cannot be used, and the reason; it may
            raise.
        """
        drafts, ahead = itertools.tee(drafts)
        pixels = stream_pixels(
            (draft.image for draft in ahead), self.images, num_workers=self.num_workers
        )
        for draft, image in zip(drafts, pixels, strict=True):
            if isinstance(image, ImageError):
                refuse(draft.key, image)
                continue
            images: tuple[ImageInput, ...] = ()
            if draft.image is not None and image is not None:
                images = (ImageInput(image[None], key=draft.image[0]),)
            yield Request(draft.key, draft.token_ids, images, draft.continuation, draft.sampling)


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
