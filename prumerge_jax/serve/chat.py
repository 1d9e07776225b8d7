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
      images: the URLs of the images, which come before the first question.
    """

    turns: tuple[str, ...]
    system: str | None
    images: tuple[str, ...]


def chat_of(messages: Sequence[Message], most_images: int) -> Chat:
    """The conversation of these messages.

    Raises:
      ApiError: 400 where roles do not alternate, or images are too many or not in the first
        question.
    """
    system = None
    turns: list[str] = []
    images: tuple[str, ...] = ()
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
        if urls and (turns or len(urls) > most_images):
            number_taken = "one image" if most_images == 1 else f"{most_images} images"
            raise _refused(
                f"{where}.content",
                f"{len(urls)} images {'in a later question' if turns else 'in one question'}; this "
                f"server takes {number_taken}, in the first question",
            )
        images = images or tuple(urls)
        text = _text(message)
        if not text.strip() and not urls:
            raise _refused(f"{where}.content", "the text is empty; expected some words")
        turns.append(text)
    if len(turns) % 2 == 0:
        raise _refused("messages", "the last message must be the user's")
    return Chat(tuple(turns), system, images)


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
