"""The routes."""

import asyncio
import contextlib
import importlib.resources
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from prumerge_jax.serve import metrics as metrics_module
from prumerge_jax.serve.admission import Admission
from prumerge_jax.serve.completions import Completion, EventStream
from prumerge_jax.serve.errors import ApiError
from prumerge_jax.serve.gate import Gate, Passage, error_response
from prumerge_jax.serve.keys import Keys
from prumerge_jax.serve.pictures import FULL
from prumerge_jax.serve.protocol import (
    ChatRequest,
    ErrorBody,
    Explained,
    ExplainRequest,
    refusal,
)
from prumerge_jax.serve.service import Generation, Service

_Result = TypeVar("_Result")

_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in (
        (400, "A field is not valid."),
        (401, "The API key is missing or wrong."),
        (404, "No such model or path."),
        (408, "The body did not arrive in time."),
        (413, "The body or the image has too many bytes."),
        (415, "The body is not JSON, or the image URL not one of an image."),
        (422, "The image cannot be used."),
        (429, "The server is full."),
        (500, "The engine failed."),
        (503, "Too late, or the server is shutting down."),
    )
}


class Server:
    """The routes of one service, and what they share."""

    def __init__(self, service: Service, keys: Keys, fingerprint: str) -> None:
        config = service.config
        self.service, self.fingerprint = service, fingerprint
        self.admission = Admission(config.max_queue, config.max_queue_bytes)
        self.created = int(time.time())
        self.app = FastAPI(
            title="prumerge_jax", docs_url=None, redoc_url=None, lifespan=self._lifespan
        )
        self.app.add_middleware(
            Gate, config=config, keys=keys, admission=self.admission, metrics=service.metrics
        )
        self._handle_errors()
        self._add_routes()

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        yield
        self.service.images.close()

    def _handle_errors(self) -> None:
        @self.app.exception_handler(ApiError)
        async def refused(request: Request, error: ApiError) -> Response:
            return error_response(error)

        @self.app.exception_handler(RequestValidationError)
        async def invalid(request: Request, error: RequestValidationError) -> Response:
            return error_response(refusal(error.errors(), error.body))

        @self.app.exception_handler(HTTPException)
        async def http_error(request: Request, error: HTTPException) -> Response:
            text = f"{request.method} {request.url.path[:200]}: {error.detail}"
            if error.status_code == 400:
                text = "the body is not JSON"
            return error_response(ApiError(error.status_code, text, headers=error.headers))

        @self.app.exception_handler(Exception)
        async def failed(request: Request, error: Exception) -> Response:
            return error_response(ApiError(500, "an error of the server's; it is logged"))

    def _add_routes(self) -> None:
        app = self.app
        app.post("/v1/chat/completions", responses=_REFUSALS)(self.chat)
        app.post("/v1/prumerge/explain", responses=_REFUSALS, response_model=Explained)(
            self.explain
        )
        app.get("/v1/models")(self.models)
        app.get("/v1/models/{name:path}", responses={404: _REFUSALS[404]})(self.model)
        app.get("/health", responses={503: _REFUSALS[503]})(self.health)
        app.get("/health/live")(self.live)
        if self.service.config.metrics_port is None:
            app.get("/metrics")(self.metrics)
        app.get("/", response_class=HTMLResponse)(self.page)

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answers a conversation."""
        passage: Passage = request.state.passage
        assert passage.hold is not None
        starting = self.service.start(body, passage.hold, passage.arrived)
        generation = await _while_connected(request, starting)
        passage.logged["reduction"] = generation.reduction
        completion = Completion(passage.id, body.model, self.fingerprint)
        if body.stream:
            pieces = generation.pieces()
            first = await _while_connected(request, _first(pieces))
            options = body.stream_options
            include_usage = options is not None and options.include_usage
            return EventStream(generation, pieces, first, completion, include_usage)
        text = await _while_connected(request, _whole(generation))
        usage = generation.usage
        passage.logged.update(vars(usage), finish_reason=generation.finish_reason)
        headers = {"x-prumerge-visual-tokens": str(usage.visual_tokens)}
        return JSONResponse(completion.whole(text, generation), headers=headers)

    async def explain(self, body: ExplainRequest, request: Request) -> Explained:
        """Says which patches of an image a reduction keeps."""
        passage: Passage = request.state.passage
        assert passage.hold is not None
        return await self.service.explain(body, passage.hold)

    async def models(self) -> dict[str, Any]:
        """Lists the one model."""
        return {"object": "list", "data": [self._model()]}

    async def model(self, name: str) -> dict[str, Any]:
        """Describes the model."""
        self.service.model.reduction(name, None)
        return self._model()

    def _model(self) -> dict[str, Any]:
        model = self.service.model
        return {
            "id": model.name,
            "object": "model",
            "created": self.created,
            "owned_by": "prumerge_jax",
            "prumerge": {
                "reductions": list(model.reductions),
                "max_prompt_tokens": model.max_prompt_tokens,
                "max_new_tokens": model.config.max_new_tokens,
                "max_images": model.pictures.limit,
                "max_image_tokens": model.pictures.most_tokens(FULL),
            },
        }

    async def health(self) -> dict[str, str]:
        """Says whether requests should be sent here."""
        reason = self.service.scheduler.unhealthy()
        if self.admission.draining:
            reason = "the server is shutting down"
        if reason is not None:
            raise ApiError(503, reason, code="unhealthy")
        return {"status": "ok"}

    async def live(self) -> dict[str, str]:
        """Says that the process lives."""
        return {"status": "ok"}

    async def metrics(self) -> Response:
        """What the server counts."""
        text = self.service.metrics.text()
        return Response(text, media_type=metrics_module.CONTENT_TYPE)

    async def page(self) -> HTMLResponse:
        """The page that asks."""
        page = importlib.resources.files("prumerge_jax.serve").joinpath("page.html")
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
        policy += "connect-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'"
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(page.read_text(), headers=headers)


async def _first(pieces: AsyncIterator[str | None]) -> str:
    """The first piece; what goes wrong before has a status of its own."""
    async for piece in pieces:
        if piece is not None:
            return piece
    return ""


async def _whole(generation: Generation) -> str:
    return "".join([piece async for piece in generation.pieces() if piece])


async def _while_connected(request: Request, work: Awaitable[_Result]) -> _Result:
    """The result of some work, which is cancelled when the client goes."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait({watch, working}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client closed the connection", code="client_closed")
        return working.result()
    finally:
        watch.cancel()
        working.cancel()
