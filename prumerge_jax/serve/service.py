"""From the body of a request to the pieces of its answer."""

import asyncio
import contextlib
import dataclasses
import hashlib
import itertools
import secrets
import time
from collections.abc import AsyncIterator

from prumerge_jax.data.pictures import PictureProcessor
from prumerge_jax.engine.request import (
    MAX_SEED,
    Answer,
    ImageInput,
    Request,
    SamplingParams,
)
from prumerge_jax.serve.admission import Hold
from prumerge_jax.serve.chat import Chat, chat_of
from prumerge_jax.serve.config import ServeConfig
from prumerge_jax.serve.errors import ApiError
from prumerge_jax.serve.images import Images
from prumerge_jax.serve.metrics import Metrics
from prumerge_jax.serve.model import ServedModel
from prumerge_jax.serve.protocol import ChatRequest, Explained, ExplainRequest
from prumerge_jax.serve.scheduler import Event, Failed, Scheduler, Ticket, Tokens
from prumerge_jax.serve.text import StoppingText

KEEP_ALIVE_SECONDS = 15.0
"""Silence after which a stream says that it lives."""


@dataclasses.dataclass(frozen=True)
class Usage:
    """Token counts of an answer.

    Attributes:
      text_tokens: of the prompt.
      visual_tokens: of its image after the reduction.
      full_tokens: of its image without a reduction.
      new_tokens: of the answer, up to its end or its stop string.
    """

    text_tokens: int
    visual_tokens: int
    full_tokens: int
    new_tokens: int


class Service:
    """Answers chat requests; lives on one event loop."""

    def __init__(
        self,
        config: ServeConfig,
        model: ServedModel,
        scheduler: Scheduler,
        images: Images,
        metrics: Metrics,
    ) -> None:
        self.config, self.model, self.scheduler = config, model, scheduler
        self.images, self.metrics = images, metrics
        self._keys = itertools.count()

    async def start(self, body: ChatRequest, hold: Hold, arrived: float) -> "Generation":
        """Checks a request, reads its image and hands it to the scheduler.

        Args:
          body: the request.
          hold: what the request holds.
          arrived: time of its arrival, of `time.monotonic`.

        Raises:
          ApiError: the request cannot be answered.
        """
        model = self.model
        reduction = model.reduction(body.model, body.reduction)
        chat = chat_of(body.messages, model.pictures.limit)
        if body.stream_options is not None and not body.stream:
            raise ApiError(
                400,
                "stream_options is given without stream; set stream to true or leave it out",
                param="stream_options",
                code="invalid_value",
            )
        ids = await asyncio.to_thread(model.prompt_ids, chat)
        sampling = _sampling(body, model, chat, len(ids) - len(chat.images), reduction)
        processor = model.processor(reduction, body.image_mode)
        images = [
            await self._image(url, processor, hold, is_alone=len(chat.images) == 1)
            for url in chat.images
        ]
        request = Request(
            next(self._keys),
            ids,
            tuple(images),
            sampling=sampling,
            question_ids=model.question_ids(chat),
            reduction=reduction,
        )
        generation = Generation(self, request, body.stops, arrived)
        self.scheduler.submit(generation.ticket)
        return generation

    async def explain(self, body: ExplainRequest, hold: Hold) -> Explained:
        """Which patches of an image a reduction keeps.

        Raises:
          ApiError: the image cannot be used, or the reduction is not allowed.
        """
        started = time.monotonic()
        reduction = self.model.reduction(self.model.name, body.reduction)
        processor = self.model.processor(reduction, "pad")
        image = await self._image(body.image_url.url, processor, hold)
        pixels, question = image.crops[0], body.question
        asked = self.scheduler.call(lambda: self.model.explain(pixels, reduction, question))
        try:
            async with asyncio.timeout(self.config.queue_timeout_s):
                explanation = await asyncio.wrap_future(asked)
        except TimeoutError:
            raise _too_late("the explanation", self.config.queue_timeout_s) from None
        except ValueError as error:
            raise ApiError(400, str(error), param="question", code="invalid_value") from error
        return Explained(
            reduction=reduction,
            grid=round(explanation.assignment.size**0.5),
            patch_indices=explanation.patch_indices.tolist(),
            assignment=explanation.assignment.tolist(),
            milliseconds=1e3 * (time.monotonic() - started),
        )

    async def _image(
        self, url: str, processor: PictureProcessor, hold: Hold, *, is_alone: bool = True
    ) -> ImageInput:
        """One image of a request; equal ones have equal keys."""
        with self.metrics.image_time.time():
            try:
                picture = await self.images.picture(url, processor, is_alone=is_alone)
            except ApiError as error:
                self.metrics.rejected_images.labels(error.code or "other").inc()
                raise
        hold.add(picture.crops.nbytes)
        key = hashlib.sha256(picture.crops.tobytes() + repr(picture.layout).encode()).hexdigest()
        return ImageInput(*picture, key=key)


def _sampling(
    body: ChatRequest, model: ServedModel, chat: Chat, text_tokens: int, reduction: str
) -> SamplingParams:
    params = ("max_completion_tokens", "max_tokens")
    given = [name for name in params if getattr(body, name) is not None]
    if len(given) > 1 and body.max_tokens != body.max_completion_tokens:
        raise ApiError(
            400,
            f"max_tokens {body.max_tokens} contradicts max_completion_tokens "
            f"{body.max_completion_tokens}; give one of them",
            param="max_tokens",
            code="invalid_value",
        )
    name = given[0] if given else "max_tokens"
    visual = model.pictures.most_tokens(model.reductions[reduction]) if chat.images else 0
    return SamplingParams(
        temperature=body.temperature or 0.0,
        top_p=1.0 if body.top_p is None else body.top_p,
        max_new_tokens=model.max_new_tokens(getattr(body, name), text_tokens, visual, name),
        seed=secrets.randbelow(MAX_SEED) if body.seed is None else body.seed,
    )


class Generation:
    """An answer that is being generated.

    Attributes:
      ticket: what the scheduler has.
      reduction: what it asked for.
      finish_reason, usage: set when the pieces have ended.
    """

    def __init__(
        self,
        service: Service,
        request: Request,
        stops: tuple[str, ...],
        arrived: float,
    ) -> None:
        self._service, self._arrived = service, arrived
        self._text = StoppingText(service.model.tokenizer, stops)
        self._events = events = asyncio.Queue[Event]()
        loop = asyncio.get_running_loop()

        def deliver(event: Event) -> None:  # without self: a circle would keep the image
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
                loop.call_soon_threadsafe(events.put_nowait, event)

        assert request.reduction is not None
        self.reduction = request.reduction
        self.ticket = Ticket(service.model.lane_of(self.reduction), request, deliver)
        self.finish_reason: str | None = None
        self.usage = Usage(request.text_tokens, 0, 0, 0)
        self._first = self._last = 0.0

    async def pieces(self) -> AsyncIterator[str | None]:
        """The pieces of the text as they come, None where none has come for a while.

        Raises:
          ApiError: no token in time, no end in time, or the engine failed.
        """
        try:
            async for event in self._in_time():
                if event is None:
                    yield None
                elif isinstance(event, Answer):
                    yield self._finish(event)
                elif not self._text.stopped:
                    self._count(event)
                    piece = self._text.push(event.token_ids)
                    if self._text.stopped:
                        self.cancel()
                    yield piece
        finally:
            if self.finish_reason is None:
                self.cancel()

    def cancel(self) -> None:
        """Ends the work; what is unread is lost."""
        self._service.scheduler.cancel(self.ticket)

    async def _in_time(self) -> AsyncIterator[Tokens | Answer | None]:
        """The events, the answer last; None where none comes for `KEEP_ALIVE_SECONDS`."""
        config = self._service.config
        while True:
            begun = bool(self.usage.new_tokens)
            limit = config.request_timeout_s if begun else config.queue_timeout_s
            left = self._arrived + limit - time.monotonic()
            if left <= 0:
                raise _too_late("the answer" if begun else "the first token", limit)
            try:
                async with asyncio.timeout(min(left, KEEP_ALIVE_SECONDS)):
                    event = await self._events.get()
            except TimeoutError:
                yield None
                continue
            if isinstance(event, Failed):
                raise _failure(event)
            yield event
            if isinstance(event, Answer):
                return

    def _count(self, tokens: Tokens) -> None:
        metrics, self._last = self._service.metrics, time.monotonic()
        if not self.usage.new_tokens:
            self._first = self._last
            metrics.first_token.observe(self._first - self._arrived)
            metrics.queue_time.observe(self.ticket.started - self._arrived)
        count = self.usage.new_tokens + len(tokens.token_ids)
        self.usage = dataclasses.replace(self.usage, new_tokens=count)

    def _finish(self, answer: Answer) -> str:
        """The last piece."""
        if answer.error is not None:
            raise ApiError(400, answer.error, param="messages", code="context_length_exceeded")
        piece = self._text.finish()
        has_image = bool(self.ticket.request.images)
        self.usage = dataclasses.replace(
            self.usage,
            visual_tokens=answer.usage.visual_tokens,
            full_tokens=self._service.model.pictures.full_tokens(self.ticket.request.images),
        )
        self.finish_reason = "stop" if self._text.stopped else answer.finish_reason
        metrics, usage = self._service.metrics, self.usage
        metrics.success.labels(self.finish_reason).inc()
        metrics.prompt_tokens.inc(usage.text_tokens + usage.visual_tokens)
        metrics.new_tokens.inc(usage.new_tokens)
        metrics.latency.observe(time.monotonic() - self._arrived)
        if usage.new_tokens > 1:
            metrics.token_time.observe((self._last - self._first) / (usage.new_tokens - 1))
        if has_image:
            metrics.visual_tokens.labels(self.reduction).observe(usage.visual_tokens)
        return piece


def _too_late(what: str, limit: float) -> ApiError:
    return ApiError(
        503,
        f"{what} took more than {limit:g} s; try again later, or ask for fewer tokens",
        code="timeout",
        headers={"Retry-After": "1"},
    )


def _failure(failed: Failed) -> ApiError:
    if failed.is_refusal:
        return ApiError(400, failed.reason, param="messages", code="invalid_value")
    return ApiError(500, f"{failed.reason}; try again", code="engine_failed")
