"""What goes into the engine and what comes out: requests and answers.

The API, the evaluation and any server use only these types to talk to the engine.
"""

import dataclasses
import math
from collections.abc import Hashable
from typing import Literal, NamedTuple

import numpy as np

from prumerge_jax.data.layout import Layout
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.messages import quoted
from prumerge_jax.models.config import MAX_STOP_IDS

MAX_SEED = 2**32
"""Seeds are smaller; the jitted functions take them as uint32."""

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""`stop`: a stop id was generated, or the continuation was scored. `length`: `max_new_tokens` were
generated. `cancelled`: by `Engine.cancel`. `error`: the request could not run."""


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_integer(value) or isinstance(value, float | np.floating)


def _out_of_bounds(name: str, value: object, expected: str) -> str:
    return f"{name} is {quoted(value)}; expected {expected}"


@dataclasses.dataclass(frozen=True, eq=False)
class ImageInput:
    """One image as the vision tower takes it.

    Attributes:
      crops: uint8 [C, S, S, 3].
      layout: what the C crops are; None for one crop, the image as it is.
      key: images of one window with equal keys are encoded once; None shares nothing.

    Raises:
      ValueError: the crops are no such array, or not as many as the layout has.
    """

    crops: np.ndarray
    layout: Layout | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        shape, expected = self.crops.shape, 1 if self.layout is None else self.layout.num_crops
        is_square = len(shape) == 4 and shape[1] == shape[2] and shape[3] == 3
        if self.crops.dtype != np.uint8 or not is_square or shape[0] != expected:
            raise ValueError(
                f"crops of {self.crops.dtype} {list(shape)}; expected uint8 [{expected}, S, S, 3]"
            )

    def layout_on(self, grid: int) -> Layout:
        """What the crops are, of `grid` patches along a side."""
        return Layout(grid) if self.layout is None else self.layout


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one answer are drawn; no value compiles anything.

    Attributes:
      temperature: divides the logits; 0 is greedy.
      top_p: draws from the smallest set of tokens with at least this probability; 1 is all.
      max_new_tokens: most tokens to generate, a stop id included.
      stop_ids: tokens that end the answer and are not part of it; None takes the model's.
      seed: seed of the draws, which do not depend on the rest of the batch.

    Raises:
      ValueError: a value is out of bounds; the message names it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 64
    stop_ids: tuple[int, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        temperature, top_p = self.temperature, self.top_p
        if not (_is_number(temperature) and math.isfinite(temperature) and temperature >= 0):
            raise ValueError(_out_of_bounds("temperature", temperature, "a finite number from 0"))
        if not (_is_number(top_p) and 0 < top_p <= 1):
            raise ValueError(_out_of_bounds("top_p", top_p, "a number above 0 and at most 1"))
        if not (_is_integer(self.max_new_tokens) and self.max_new_tokens >= 1):
            raise ValueError(
                _out_of_bounds("max_new_tokens", self.max_new_tokens, "an integer, at least 1")
            )
        if not (_is_integer(self.seed) and 0 <= self.seed < MAX_SEED):
            raise ValueError(_out_of_bounds("seed", self.seed, "an integer from 0 to 2**32 - 1"))
        ids = self.stop_ids
        if ids is not None and not (
            isinstance(ids, tuple)
            and len(ids) <= MAX_STOP_IDS
            and all(_is_integer(token) and token >= 0 for token in ids)
        ):
            raise ValueError(
                _out_of_bounds("stop_ids", ids, f"None or a tuple of at most {MAX_STOP_IDS} ids")
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One sequence to run: to generate from, or, with a continuation, to score.

    Attributes:
      key: names the request in its answer.
      token_ids: int32 [T] with one `IMAGE_TOKEN` for each image, where it goes.
      images: in the order of their tokens.
      continuation: int32 token ids to score after `token_ids`; empty when generating.
      question_ids: int32 token ids of the question's keywords, for reductions that read them.
      sampling: how tokens are drawn; has no effect on scoring.
      reduction: name of one of a `SharedEngine`'s; None in an engine of one.

    Raises:
      ValueError: other than one `IMAGE_TOKEN` per image.
    """

    key: int
    token_ids: np.ndarray
    images: tuple[ImageInput, ...] = ()
    continuation: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    sampling: SamplingParams = SamplingParams()
    question_ids: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    reduction: str | None = None

    def __post_init__(self) -> None:
        placeholders = int(np.count_nonzero(self.token_ids == IMAGE_TOKEN))
        if placeholders != len(self.images):
            raise ValueError(
                f"request {self.key} has {placeholders} image tokens ({IMAGE_TOKEN}) and "
                f"{len(self.images)} images; expected one token for each image"
            )

    @property
    def text_tokens(self) -> int:
        """Number of tokens of the prompt, the images' not counted."""
        return len(self.token_ids) - len(self.images)

    @property
    def opening(self) -> "Opening":
        """What the engine's shapes are fitted to."""
        token_ids = np.concatenate([self.token_ids, self.continuation])
        names = (id(image) if image.key is None else image.key for image in self.images)
        known = [image.layout for image in self.images if image.layout is not None]
        layouts = tuple(known) if len(known) == len(self.images) else ()
        return Opening(token_ids, tuple(names), layouts)


class Opening(NamedTuple):
    """A request as far as it is known before its images are seen.

    Attributes:
      token_ids: int32 [T], prompt and continuation, with one `IMAGE_TOKEN` for each image.
      images: names of the images; equal names are one image.
      layouts: of the images, where they differ from image to image; else empty.
    """

    token_ids: np.ndarray
    images: tuple[Hashable, ...] = ()
    layouts: tuple[Layout, ...] = ()

    @property
    def text_tokens(self) -> int:
        """Number of tokens, the images' not counted."""
        return len(self.token_ids) - len(self.images)


class Usage(NamedTuple):
    """Numbers of tokens: visual ones, the prompt's text, and generated ones without stop id."""

    visual_tokens: int
    text_tokens: int
    new_tokens: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """The result of a request.

    Attributes:
      key: the request's.
      token_ids: generated tokens without the stop id; empty when scoring.
      log_likelihood: summed log-likelihood of the continuation, in nats; NaN when generating.
      finish_reason: why it ended.
      usage: token counts.
      error: why the request could not run; None when it did.
    """

    key: int
    token_ids: tuple[int, ...]
    log_likelihood: float
    finish_reason: FinishReason
    usage: Usage
    error: str | None = None


class Delta(NamedTuple):
    """Tokens of an answer that is being generated, without the stop id."""

    key: int
    token_ids: tuple[int, ...]


class SequenceLogits(NamedTuple):
    """Next-token logits of a request at every position.

    Attributes:
      key: the request's.
      values: float32 [T, V]; T counts visual tokens and newlines.
    """

    key: int
    values: np.ndarray
