"""Answers in OpenAI's form, whole or as a stream of server-sent events."""

import dataclasses
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from prumerge_jax.serve.errors import ApiError
from prumerge_jax.serve.service import Generation, Usage


@dataclasses.dataclass(frozen=True)
class Completion:
    """What the answer of a request says besides its text.

    Attributes:
      id: of the request.
      model: as the request named it.
      fingerprint: of weights and code.
      created: time in seconds of the epoch.
    """

    id: str
    model: str
    fingerprint: str
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, generation: Generation) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "logprobs": None,
            "finish_reason": generation.finish_reason,
        }
        return self._body("chat.completion", [choice]) | {"usage": usage_body(generation.usage)}

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        """A piece of a streamed answer."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._body("chat.completion.chunk", [choice])

    def last_chunk(self, usage: Usage) -> dict[str, Any]:
        """The chunk that has the usage of a streamed answer."""
        return self._body("chat.completion.chunk", []) | {"usage": usage_body(usage)}

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


def usage_body(usage: Usage) -> dict[str, Any]:
    """Token counts in OpenAI's form; the prompt's include the visual ones."""
    prompt_tokens = usage.text_tokens + usage.visual_tokens
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": usage.new_tokens,
        "total_tokens": prompt_tokens + usage.new_tokens,
        "prompt_tokens_details": {
            "image_tokens": usage.visual_tokens,
            "image_tokens_full": usage.full_tokens,
        },
    }


class EventStream(StreamingResponse):
    """A streamed answer; when the client goes, its work ends.

    Args:
      generation: the answer.
      pieces: its pieces, the first one taken off.
      first: the first one.
      completion: what the chunks say besides.
      include_usage: whether a last chunk has the usage.
    """

    def __init__(
        self,
        generation: Generation,
        pieces: AsyncIterator[str | None],
        first: str,
        completion: Completion,
        include_usage: bool,
    ) -> None:
        self._generation, self._pieces, self._first = generation, pieces, first
        self._completion, self._include_usage = completion, include_usage
        super().__init__(
            self._events(),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._generation.finish_reason is None:
                self._generation.cancel()

    async def _events(self) -> AsyncIterator[bytes]:
        completion, generation = self._completion, self._generation
        yield self._event(completion.chunk({"role": "assistant", "content": self._first}))
        try:
            async for piece in self._pieces:
                if piece is None:
                    yield b": keep-alive\n\n"
                elif piece:
                    yield self._event(completion.chunk({"content": piece}))
        except ApiError as error:
            yield self._event(error.body())
            return
        yield self._event(completion.chunk({}, generation.finish_reason))
        if self._include_usage:
            yield _encoded(completion.last_chunk(generation.usage))
        yield b"data: [DONE]\n\n"

    def _event(self, body: dict[str, Any]) -> bytes:
        return _encoded(body | {"usage": None} if self._include_usage else body)


def _encoded(body: dict[str, Any]) -> bytes:
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
