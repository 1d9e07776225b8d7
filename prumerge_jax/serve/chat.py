"""The conversation in a request's messages: who speaks when, and where the image is."""

import dataclasses
from collections.abc import Sequence

from prumerge_jax.serve.errors import ApiError
from prumerge_jax.serve.protocol import (
    AssistantMessage,
    ImagePart,
    Message,
    SystemMessage,
    UserMessage,
)


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation that the assistant is to continue.

    Attributes:
      turns: texts of the user and the assistant in turn, the user's first and last.
      system: instructions, None where there are none.
      image: the URL of the image, None where there is none.
    """

    turns: tuple[str, ...]
    system: str | None
    image: str | None


def chat_of(messages: Sequence[Message]) -> Chat:
    """The conversation of these messages.

    Raises:
      ApiError: 400 where roles do not alternate, or an image is not alone in the first question.
    """
    system = None
    turns: list[str] = []
    image = None
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        if isinstance(message, SystemMessage):
            if number:
                raise _refused(f"{where}.role", "a system message can only be the first one")
            system = _text(message)
            continue
        expected = UserMessage if len(turns) % 2 == 0 else AssistantMessage
        if not isinstance(message, expected):
            role = "user" if expected is UserMessage else "assistant"
            raise _refused(
                f"{where}.role",
                f"the role is {message.role!r}; expected {role!r}, the two in turn",
            )
        urls = _images(message)
        if urls and (turns or len(urls) > 1):
            raise _refused(
                f"{where}.content",
                f"{len(urls)} images {'in a later question' if turns else 'in one question'}; this "
                "model takes one image, in the first question",
            )
        image = urls[0] if urls else image
        text = _text(message)
        if not text.strip() and not urls:
            raise _refused(f"{where}.content", "the text is empty; expected some words")
        turns.append(text)
    if len(turns) % 2 == 0:
        raise _refused("messages", "the last message must be the user's")
    return Chat(tuple(turns), system, image)


def _text(message: Message) -> str:
    """The text of a message, its parts in lines."""
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content if not isinstance(part, ImagePart))


def _images(message: Message) -> list[str]:
    if isinstance(message.content, str):
        return []
    return [part.image_url.url for part in message.content if isinstance(part, ImagePart)]


def _refused(param: str, reason: str) -> ApiError:
    return ApiError(400, f"{param}: {reason}", param=param, code="invalid_value")
