"""The bodies of OpenAI's chat interface: requests that are checked field by field, and answers.

What is not here is refused, never ignored: a client learns at once that a field has no effect.
"""

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, Field

from prumerge_jax.engine.request import MAX_SEED
from prumerge_jax.messages import did_you_mean, quoted
from prumerge_jax.serve.errors import ApiError

MAX_MESSAGES = 256
MAX_TEXT = 1_000_000
"""Characters of one text; the prompt's tokens have a limit of their own."""
MAX_STOPS = 4
MAX_STOP_LENGTH = 32


class _Strict(BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str = Field(max_length=MAX_TEXT)


class ImageUrl(_Strict):
    """An image as a data URL or, where the server allows its host, a link."""

    url: str
    detail: Literal["auto"] = "auto"


class ImagePart(_Strict):
    """An image."""

    type: Literal["image_url"]
    image_url: ImageUrl


_Text = Annotated[str, Field(max_length=MAX_TEXT)]
_Texts = Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES)]
_Parts = Annotated[
    list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
    Field(min_length=1, max_length=MAX_MESSAGES),
]


class SystemMessage(_Strict):
    """Instructions; at most one message, and the first."""

    role: Literal["system"]
    content: _Text | _Texts


class UserMessage(_Strict):
    """A question, with an image in the first one."""

    role: Literal["user"]
    content: _Text | _Parts


class AssistantMessage(_Strict):
    """An earlier answer."""

    role: Literal["assistant"]
    content: _Text | _Texts


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]
_Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    include_usage: bool = False


class ChatRequest(_Strict):
    """The body of a chat completion."""

    model: str = Field(max_length=256, description="NAME or NAME@REDUCTION")
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(None, ge=0, lt=MAX_SEED)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    logprobs: Literal[False] | None = None
    user: str | None = Field(None, max_length=256)
    metadata: dict[str, str] | None = Field(None, max_length=16)
    reduction: str | None = Field(
        None, max_length=256, description="one that the server was started with"
    )
    image_mode: Literal["pad", "crop", "anyres"] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ExplainRequest(_Strict):
    """The body of a question about which patches of an image are kept."""

    image_url: ImageUrl
    question: str | None = Field(None, max_length=MAX_TEXT)
    reduction: str | None = Field(None, max_length=256)


class Explained(BaseModel):
    """What a reduction keeps of an image.

    Attributes:
      grid: patches along one side.
      patch_indices: the kept ones, row by row from the top left, in the order of their tokens.
      assignment: for each patch the number of the token that takes it in, -1 for none.
      milliseconds: the time that it took.
    """

    reduction: str
    grid: int
    patch_indices: list[int]
    assignment: list[int]
    milliseconds: float


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """A refusal."""

    error: ErrorDetail


def refusal(errors: Sequence[Any], body: Any) -> ApiError:
    """The refusal of a body that is not valid.

    Args:
      errors: pydantic's.
      body: what was sent, parsed.
    """
    # Of a union, the member that was meant.
    error = max(errors, key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")))
    kind = error["type"]
    if kind in ("json_invalid", "json_type"):
        reason = error.get("ctx", {}).get("error", error["msg"])
        return ApiError(400, f"the body is not JSON: {reason}", code="invalid_json")
    param, value = _field(error["loc"], body)
    if kind == "extra_forbidden":
        known = [*ChatRequest.model_fields] if len(error["loc"]) == 2 else []
        hint = did_you_mean(param, known) or "; leave it out"
        return ApiError(
            400,
            f"unsupported parameter {quoted(param)}{hint}",
            param=param,
            code="unsupported_parameter",
        )
    if kind == "missing":
        return ApiError(400, f"{param or 'the body'} is missing", param=param, code="missing")
    message = error["msg"].replace("Input should be", "expected").removeprefix("Value error, ")
    named = f"{param} is {quoted(value)}" if param else f"the body is {quoted(value)}"
    return ApiError(400, f"{named}; {message}", param=param or None, code="invalid_value")


def _field(location: Sequence[str | int], body: Any) -> tuple[str, Any]:
    """Path and value of a field: the parts of a location that the body has.

    The others are the names of a union's members, some of which are fields' names too.
    """
    _, path, value = _resolved(tuple(location), body)
    return ".".join(map(str, path)), value


def _resolved(location: tuple[str | int, ...], value: Any) -> tuple[bool, list[str | int], Any]:
    """Whether the last part was found, the parts that were, and the value there."""
    if not location:
        return True, [], value
    part, rest = location[0], location[1:]
    found = _resolved(rest, value) if rest else (False, [], value)
    is_item = isinstance(part, int) and isinstance(value, list) and part < len(value)
    if is_item or (isinstance(value, dict) and part in value):
        is_last, path, inner = _resolved(rest, value[part])
        deeper = (is_last, [part, *path], inner)
    elif not rest and isinstance(value, dict) and re.fullmatch(r"\w+", str(part)):
        deeper = (True, [part], None)  # the field that is missing
    else:
        return found
    return max(deeper, found, key=lambda each: (each[0], len(each[1])))
