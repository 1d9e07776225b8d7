"""What every request passes first: its key, its media type, a free place, its size and time."""

import asyncio
import dataclasses
import logging
import secrets
import time
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from prumerge_jax.messages import quoted
from prumerge_jax.serve.admission import Admission, Hold
from prumerge_jax.serve.config import ServeConfig
from prumerge_jax.serve.errors import ApiError
from prumerge_jax.serve.keys import Keys
from prumerge_jax.serve.metrics import Metrics

_LOG = logging.getLogger(__name__)

OPEN_PATHS = ("/health", "/health/live")
"""Paths that ask for no key."""
BODY_PATHS = ("/v1/chat/completions", "/v1/prumerge/explain")
"""Paths that take a body."""


@dataclasses.dataclass
class Passage:
    """What the gate knows of a request.

    Attributes:
      id: names it in logs and in its answer.
      arrived: of `time.monotonic`.
      hold: what it holds of the server, None on paths without a body.
      status: of the response, 0 before it began.
      logged: what its line in the log says besides.
    """

    id: str
    arrived: float
    hold: Hold | None = None
    status: int = 0
    logged: dict[str, Any] = dataclasses.field(default_factory=dict)


class Gate:
    """ASGI middleware: refuses what need not be looked at further, and logs every request."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        config: ServeConfig,
        keys: Keys,
        admission: Admission,
        metrics: Metrics,
    ) -> None:
        self._app, self._config, self._keys = app, config, keys
        self._admission, self._metrics = admission, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        passage = Passage(secrets.token_hex(12), time.monotonic())
        scope.setdefault("state", {})["passage"] = passage

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                passage.status = message["status"]
                headers = message.setdefault("headers", [])
                message["headers"] = [*headers, (b"x-request-id", passage.id.encode())]
            await send(message)

        try:
            await self._pass(scope, receive, watched, passage)
        except ApiError as error:
            await error_response(error)(scope, receive, watched)
        finally:
            self._log(scope, passage)

    async def _pass(self, scope: Scope, receive: Receive, send: Send, passage: Passage) -> None:
        headers = dict(scope["headers"])
        path = scope["path"]
        if path not in OPEN_PATHS:
            self._keys.check(headers.get(b"authorization"))
        if scope["method"] != "POST" or path not in BODY_PATHS:
            await self._app(scope, receive, send)
            return
        media_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if media_type != b"application/json":
            raise ApiError(
                415,
                f"Content-Type is {quoted(media_type.decode('latin-1'))}; expected "
                "'application/json'",
                code="unsupported_media_type",
            )
        with self._admission.admit() as passage.hold:
            body = await self._body(headers, receive, passage.hold)
            if body is not None:
                await self._app(scope, _replayed(body, receive), send)

    async def _body(
        self, headers: dict[bytes, bytes], receive: Receive, hold: Hold
    ) -> bytes | None:
        """The body, or None where the client has gone."""
        config = self._config
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > config.max_body_bytes:
            raise _too_large(f"{int(declared[:20]):,}", config.max_body_bytes)
        chunks, size = [], 0
        try:
            async with asyncio.timeout(config.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > config.max_body_bytes:
                        raise _too_large("more", config.max_body_bytes)
                    hold.add(len(chunk))
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not arrive within {config.body_timeout_s:g} s ({size:,} bytes did); "
                "send a smaller image",
                code="body_timeout",
            ) from None

    def _log(self, scope: Scope, passage: Passage) -> None:
        if passage.status >= 400:
            self._metrics.errors.labels(str(passage.status)).inc()
        elif scope["path"] not in BODY_PATHS:
            return
        fields = {
            "id": passage.id,
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": passage.status,
            "seconds": round(time.monotonic() - passage.arrived, 4),
            **passage.logged,
        }
        text = " ".join(f"{name}={value!r}" for name, value in fields.items())
        _LOG.info("%s", text, extra={"fields": fields})


def error_response(error: ApiError) -> JSONResponse:
    """The response that a refusal is."""
    return JSONResponse(error.body(), error.status, headers=error.headers)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` with a body in front of it."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


def _too_large(size: str, limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body has {size} bytes, of at most {limit:,}; send a smaller image",
        code="body_too_large",
    )
