"""An engine that computes nothing, and a server around it: HTTP without a network or a model."""

import asyncio
import base64
import contextlib
import functools
import io
import pathlib
from collections.abc import AsyncIterator, Callable

import httpx
import numpy as np
from PIL import Image

from prumerge_jax.engine.request import Answer, Delta, Request, Usage
from prumerge_jax.llava import Llava
from prumerge_jax.serve.app import Server
from prumerge_jax.serve.config import ServeConfig
from prumerge_jax.serve.images import Images
from prumerge_jax.serve.keys import Keys
from prumerge_jax.serve.metrics import Metrics
from prumerge_jax.serve.model import ServedModel
from prumerge_jax.serve.scheduler import Scheduler
from prumerge_jax.serve.service import Service

CONFIG = ServeConfig(reductions=("prumerge", "full", "cover:tokens=32"), num_workers=1)
VISUAL_TOKENS = 9


def answer_of(request: Request) -> list[int]:
    """The tokens of an answer: they depend on prompt, pixels and seed alone."""
    pixels = sum(int(image.crops.sum()) for image in request.images)
    state = int(request.token_ids.sum()) + pixels + request.sampling.seed
    rng = np.random.default_rng(state % 2**32)
    return rng.integers(100, 300, request.sampling.max_new_tokens).tolist()


class FakeCore:
    """Yields two tokens of every request a step; fails on request.

    Attributes:
      fail: called before every step with the running requests; may raise.
      cancelled: keys that were cancelled.
    """

    def __init__(self, fail: Callable[[list[Request]], None] = lambda running: None) -> None:
        self.fail = fail
        self.running: dict[int, tuple[Request, list[int]]] = {}
        self.cancelled: set[int] = set()

    def submit(self, request: Request) -> None:
        if request.sampling.max_new_tokens == 13:
            raise ValueError("13 tokens bring no luck")
        self.running[request.key] = request, answer_of(request)

    def cancel(self, key: int) -> None:
        self.cancelled.add(key)

    def step(self) -> list[Delta | Answer]:
        self.fail([request for request, _ in self.running.values()])
        events: list[Delta | Answer] = []
        for key, (request, left) in list(self.running.items()):
            whole = answer_of(request)
            done = len(whole) - len(left)
            ended = key in self.cancelled
            if not ended:
                events.append(Delta(key, tuple(left[:2])))
                del left[:2]
                done = len(whole) - len(left)
            if ended or not left:
                usage = Usage(VISUAL_TOKENS * len(request.images), request.text_tokens, done)
                reason = "cancelled" if ended else "length"
                events.append(Answer(key, tuple(whole[:done]), float("nan"), reason, usage))
                del self.running[key]
        return events


@functools.cache
def miniature() -> Llava:
    return Llava.load("miniature")


class FakeServer:
    """A server around fake engines, or those of a model, and a client that speaks to it.

    Attributes:
      cores: every engine that was made.
    """

    def __init__(
        self,
        config: ServeConfig = CONFIG,
        fail: Callable[[list[Request]], None] = lambda running: None,
        capacity: int = 4,
        fetcher=None,
        llava: Llava | None = None,
    ) -> None:
        self.cores: list[FakeCore] = []

        def make() -> FakeCore:
            self.cores.append(FakeCore(fail))
            return self.cores[-1]

        self.model = ServedModel(llava or miniature(), config)
        self.scheduler = Scheduler(dict.fromkeys(self.model.lanes, make), capacity)
        if llava is not None:
            self.scheduler = self.model.scheduler()
        metrics = Metrics(
            self.scheduler.in_flight, "0" * 64, self.model.pages_used, self.model.row_fill
        )
        images = Images(config, fetcher)
        self.service = Service(config, self.model, self.scheduler, images, metrics)
        self.server = Server(self.service, Keys(config.api_key_file), "test")

    @contextlib.asynccontextmanager
    async def client(self, **headers: str) -> AsyncIterator[httpx.AsyncClient]:
        self.scheduler.start()
        transport = httpx.ASGITransport(self.server.app, raise_app_exceptions=False)
        try:
            async with httpx.AsyncClient(
                transport=transport, base_url="http://test", headers=headers, timeout=60
            ) as client:
                yield client
        finally:
            for _ in range(500):
                if not any(self.scheduler.in_flight()):
                    break
                await asyncio.sleep(0.01)
            self.scheduler.stop()
            self.service.images.close()

    def ask(self, *bodies: object, **headers: str) -> list[httpx.Response]:
        """The responses to chat requests, one after the other."""

        async def all_of_them() -> list[httpx.Response]:
            async with self.client(**headers) as client:
                return [await post(client, body) for body in bodies]

        return asyncio.run(all_of_them())


async def post(client: httpx.AsyncClient, body: object) -> httpx.Response:
    path = "/v1/chat/completions"
    if isinstance(body, bytes | str):
        return await client.post(path, content=body, headers={"content-type": "application/json"})
    return await client.post(path, json=body)


def png(width: int = 8, height: int = 8, value: int = 90, file_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (value, 40, 20)).save(buffer, file_format)
    return buffer.getvalue()


def data_url(content: bytes, label: str = "image/png") -> str:
    return f"data:{label};base64,{base64.b64encode(content).decode()}"


def chat(text: str = "How many digits?", image: str | None = None, **fields: object) -> dict:
    parts: list[dict] = [{"type": "text", "text": text}]
    if image is not None:
        parts.append({"type": "image_url", "image_url": {"url": image}})
    message = {"role": "user", "content": parts if image is not None else text}
    return {"model": "miniature", "messages": [message], "max_tokens": 7} | fields


def key_file(folder: pathlib.Path) -> pathlib.Path:
    path = folder / "keys"
    path.write_text("# ours\nsecret-secret-secret\nanother-key-of-ours\n")
    return path
