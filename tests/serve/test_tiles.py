"""Models that cut an image into tiles, and take several: the server's answers are the library's."""

import asyncio
import dataclasses
import functools

import httpx
import jax.numpy as jnp
import pytest
from flax import nnx

from prumerge_jax.engine.encoding import PlacedModel
from prumerge_jax.llava import Llava
from prumerge_jax.serve.config import ServeConfig
from prumerge_jax.serve.engines import engine_config
from prumerge_jax.serve.metrics import compilations
from tests.families import ONEVISION_TIED
from tests.serve.fakes import FakeServer, chat, data_url, miniature, png, post
from tests.tiny_llava import random_llava

MODEL = dataclasses.replace(
    ONEVISION_TIED,
    text=dataclasses.replace(ONEVISION_TIED.text, vocab_size=512),
    image_grid_pinpoints=((48, 96), (96, 48), (96, 96)),
    anyres_max=2,
    chat_template="vicuna_v1",
    video_token_id=None,
)
CONFIG = ServeConfig(
    checkpoint="tiles",
    reductions=("full", "prumerge"),
    max_images=2,
    max_prompt_tokens=128,
    max_new_tokens=6,
    slots=2,
    num_workers=1,
)
WIDE, SMALL, TALL = png(120, 40, 30), png(40, 40, 200), png(50, 130, 90)
CASES = [(WIDE,), (TALL,), (SMALL, WIDE), ()]


@functools.cache
def tiles() -> Llava:
    graphdef, state = nnx.split(random_llava(MODEL, gain=3))
    model = PlacedModel(graphdef, state, MODEL, jnp.dtype(jnp.float32))
    return Llava(model, miniature().tokenizer, engine=engine_config(CONFIG))


def asked(images: tuple[bytes, ...], **fields: object) -> dict:
    parts: list[dict] = [{"type": "text", "text": "What is this?"}]
    urls = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    body = chat(model="tiles", max_tokens=6)
    return body | {"messages": [{"role": "user", "content": urls + parts}]} | fields


@pytest.mark.slow
def test_answers_are_the_librarys() -> None:
    server = FakeServer(CONFIG, llava=tiles())

    async def run() -> tuple[list[httpx.Response], int]:
        async with server.client() as client:
            while not server.scheduler.started.done():
                await asyncio.sleep(0.1)
            compiled = compilations()
            bodies = [
                asked(images, reduction=name) for name in CONFIG.reductions for images in CASES
            ]
            responses = await asyncio.gather(*(post(client, body) for body in bodies))
            return responses, compilations() - compiled

    responses, compiled = asyncio.run(run())
    assert compiled == 0
    counts = []
    for number, name in enumerate(CONFIG.reductions):
        expected = tiles().generate(
            [images or None for images in CASES],
            ["What is this?"] * len(CASES),
            reduction=name,
            max_new_tokens=6,
        )
        for response, text in zip(responses[4 * number :], expected, strict=False):
            assert response.status_code == 200, response.text
            assert response.json()["choices"][0]["message"]["content"] == text
            counts.append(response.json()["usage"]["prompt_tokens_details"])
    full, reduced = counts[:4], counts[4:]
    for before, after in zip(full, reduced, strict=True):
        assert before["image_tokens"] == before["image_tokens_full"] == after["image_tokens_full"]
    assert full[3]["image_tokens"] == 0
    # Of several images each is one crop, of 3 x 3 patches and a newline.
    assert full[2]["image_tokens"] == 2 * (9 + 1)
    assert full[0]["image_tokens"] > 2 * 9
    assert all(
        after["image_tokens"] < before["image_tokens"]
        for before, after in zip(full[:2], reduced[:2], strict=True)
    )
    assert server.model.pages_used() == 0


def test_images_are_limited() -> None:
    config = dataclasses.replace(CONFIG, reductions=("full",))
    server = FakeServer(config, llava=tiles())

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(server.server.app), base_url="http://test"
        ) as client:
            return await post(client, asked((SMALL, SMALL, SMALL)))

    response = asyncio.run(run())
    assert response.status_code == 400
    assert (
        "3 images in one question; this server takes 2 images"
        in response.json()["error"]["message"]
    )
    assert server.model.pictures.most_crops == 5
    server.service.images.close()


def test_one_image_where_the_model_takes_one() -> None:
    with pytest.raises(ValueError, match="--max_images 2: .* the model takes one image"):
        FakeServer(dataclasses.replace(CONFIG, checkpoint="miniature"))
