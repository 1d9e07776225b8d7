"""Hostile requests: each is refused with its status and a reason, and the server goes on."""

import asyncio
import dataclasses
import json
import pathlib
from typing import Any

import pytest

from tests.serve.fakes import CONFIG, FakeServer, chat, data_url, key_file, png, post

LIMITED = dataclasses.replace(
    CONFIG,
    max_body_bytes=200_000,
    max_image_bytes=50_000,
    max_image_pixels=10_000,
    max_prompt_tokens=200,
    max_new_tokens=100,
)
GOOD = data_url(png())


def with_message(**message: Any) -> dict:
    return chat() | {"messages": [message]}


def with_messages(*roles: str) -> dict:
    return chat() | {"messages": [{"role": role, "content": "word"} for role in roles]}


def with_images(*urls: str) -> dict:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return with_message(role="user", content=parts)


CUT = png(90, 90)[:60]
HOSTILE: dict[str, tuple[Any, int, str]] = {
    # bodies
    "empty body": ("", 400, "the body is missing"),
    "not json": ("{", 400, "not JSON"),
    "bytes": (b"\xff\xfe\x00", 400, "not JSON"),
    "a list": ("[]", 400, "the body is []"),
    "a number": ("1", 400, "the body is 1"),
    "null": ("null", 400, "the body"),
    "deep": ("[" * 100_000, 400, "not JSON"),
    "deep object": ('{"model":' * 20_000, 400, "not JSON"),
    "huge number": (json.dumps(chat()).replace("7", "9" * 10_000), 400, "not JSON"),
    "body of 300 KB": (chat("x" * 300_000), 413, "of at most 200,000"),
    # fields
    "no model": ({"messages": chat()["messages"]}, 400, "model is missing"),
    "no messages": ({"model": "miniature"}, 400, "messages is missing"),
    "another model": (chat(model="gpt-5"), 404, "'gpt-5' is not served; expected 'miniature'"),
    "tools": (chat(tools=[]), 400, "unsupported parameter 'tools'"),
    "a typo": (chat(max_token=4), 400, "did you mean 'max_tokens'?"),
    "unknown in a part": (
        with_message(role="user", content=[{"type": "text", "text": "a", "cache": 1}]),
        400,
        "unsupported parameter 'messages.0.content.0.cache'",
    ),
    "n": (chat(n=2), 400, "n is 2; expected 1"),
    "logprobs": (chat(logprobs=True), 400, "logprobs is True"),
    "hot": (chat(temperature=2.5), 400, "temperature is 2.5; expected less than or equal to 2"),
    "NaN": (json.dumps(chat(temperature=float("nan"))), 400, "temperature is nan"),
    "a string": (chat(temperature="1"), 400, "temperature is '1'; expected a valid number"),
    "top_p": (chat(top_p=0), 400, "top_p is 0"),
    "seed": (chat(seed=-1), 400, "seed is -1"),
    "big seed": (chat(seed=2**32), 400, "seed is 4294967296"),
    "no tokens": (chat(max_tokens=0), 400, "max_tokens is 0"),
    "many tokens": (chat(max_tokens=101), 400, "max_tokens is 101; at most 100 fit"),
    "huge count": (chat(max_tokens=10**18), 400, "max_tokens is 1000000000000000000"),
    "two counts": (chat(max_completion_tokens=8), 400, "contradicts max_completion_tokens 8"),
    "true as a number": (chat(max_tokens=True), 400, "max_tokens is True"),
    "five stops": (chat(stop=list("abcde")), 400, "stop is ["),
    "long stop": (chat(stop="x" * 33), 400, "stop is 'xxx"),
    "empty stop": (chat(stop=""), 400, "stop is ''"),
    "options alone": (chat(stream_options={}), 400, "stream_options is given without stream"),
    "metadata": (chat(metadata={"a": 1}), 400, "metadata.a is 1"),
    # reductions
    "not allowed": (chat(reduction="prumerge+"), 400, "expected one of prumerge full cover"),
    "no reduction": (chat(reduction="x" * 200), 400, "is not served"),
    "in the name": (chat(model="miniature@cover:tokens=33"), 400, "is not served"),
    "both": (chat(model="miniature@full", reduction="prumerge"), 400, "contradicts"),
    # messages
    "nothing said": (chat() | {"messages": []}, 400, "messages is []"),
    "257 messages": (with_messages(*["user"] * 257), 400, "at most 256 items"),
    "a tool": (with_messages("tool"), 400, "messages.0"),
    "late system": (with_messages("user", "system"), 400, "can only be the first"),
    "two questions": (with_messages("user", "user"), 400, "expected 'assistant'"),
    "last word": (with_messages("user", "assistant"), 400, "the last message must be the user's"),
    "an empty text": (chat(""), 400, "the text is empty"),
    "a placeholder": (chat("what is <image>?"), 400, "literal '<image>'"),
    "a surrogate": (json.dumps(chat("a\ud800b")), 400, "messages.0.content"),
    "a surrogate as a field": (json.dumps(chat(**{"\ud800": 1})), 400, ""),
    "long prompt": (chat("word " * 500), 400, "text tokens, of at most 200; shorten it"),
    # images
    "two images": (with_images(GOOD, GOOD), 400, "2 images in one question"),
    "later image": (
        chat() | {"messages": with_messages("user", "assistant")["messages"]
                  + with_images(GOOD)["messages"]},
        400,
        "1 images in a later question",
    ),
    "by an assistant": (
        with_message(
            role="assistant", content=[{"type": "image_url", "image_url": {"url": GOOD}}]
        ),
        400,
        "messages.0.content.0",
    ),
    "detail": (
        with_message(role="user", content=[
            {"type": "image_url", "image_url": {"url": GOOD, "detail": "low"}}]),
        400,
        "detail is 'low'; expected 'auto'",
    ),
    "tiles": (
        chat(image=GOOD, image_mode="anyres"),
        400,
        "'anyres' is for models with image_grid_pinpoints",
    ),
    "a path": (with_images("/etc/passwd"), 415, "expected 'data:image/...;base64,...'"),
    "a file": (with_images("file:///etc/passwd"), 415, "expected 'data:image/...;base64,...'"),
    "text as data": (with_images("data:text/html;base64,AAAA"), 415, "expected 'data:image"),
    "not base64": (with_images("data:image/png;base64,!!!!"), 400, "is not base64"),
    "percent": (with_images("data:image/png,%89PNG"), 415, "expected 'data:image"),
    "no bytes": (with_images("data:image/png;base64,"), 422, "the file is empty"),
    "no image": (with_images(data_url(b"hello")), 422, "not a readable image"),
    "svg": (with_images(data_url(b"<svg/>", "image/svg+xml")), 422, "HTML or XML"),
    "cut short": (with_images(data_url(CUT)), 422, "image"),
    "tiff": (with_images(data_url(png(file_format="TIFF"))), 422, "known format"),
    "large": (with_images(data_url(png(101, 100))), 422, "101 x 100 pixels are too many"),
    "many bytes": (with_images(data_url(b"\0" * 60_000)), 413, "more than 50,000 bytes"),
    "http off": (with_images("https://example.org/a.png"), 400, "this server fetches nothing"),
    "metadata address": (with_images("http://169.254.169.254/latest"), 400, "fetches nothing"),
}  # fmt: skip


def test_hostile_requests() -> None:
    server = FakeServer(LIMITED)

    async def run() -> None:
        async with server.client() as client:
            for name, (body, status, message) in HOSTILE.items():
                response = await post(client, body)
                assert response.status_code == status, (name, response.text)
                error = response.json()["error"]
                assert message in error["message"], (name, error)
                assert set(error) == {"message", "type", "param", "code"}
                assert len(error["message"]) < 700
                assert "\n" not in error["message"]
            good = await post(client, chat(image=GOOD))
            assert good.status_code == 200, good.text

    asyncio.run(run())
    assert len(HOSTILE) >= 40
    assert (server.server.admission.requests, server.server.admission.held_bytes) == (0, 0)
    assert server.scheduler.in_flight() == (0, 0)


def test_other_paths_methods_and_types() -> None:
    async def run() -> list[tuple[int, dict]]:
        async with FakeServer().client() as client:
            path = "/v1/chat/completions"
            text = {"content-type": "text/plain"}
            form = {"content-type": "application/x-www-form-urlencoded"}
            responses = [
                await client.get("/v1/engines"),
                await client.get(path),
                await client.delete("/metrics"),
                await client.post(path, content=b"{}", headers=text),
                await client.post(path, content=b"model=miniature", headers=form),
                await client.get("/v1/models/other"),
                await client.post("/v1/prumerge/explain", json={"image_url": {"url": "x"}}),
                await client.post("/v1/prumerge/explain", json={"image": "x"}),
            ]
            return [(each.status_code, each.json()["error"]) for each in responses]

    got = asyncio.run(run())
    assert [status for status, _ in got] == [404, 405, 405, 415, 415, 404, 415, 400]
    assert "expected 'application/json'" in got[3][1]["message"]


def test_a_body_that_is_declared_too_large_or_drips() -> None:
    config = dataclasses.replace(LIMITED, body_timeout_s=0.2)

    async def run() -> tuple[int, int, str]:
        async def slowly():
            yield b"{"
            await asyncio.sleep(5)
            yield b"}"

        async with FakeServer(config).client() as client:
            headers = {"content-type": "application/json"}
            path = "/v1/chat/completions"
            large = {**headers, "content-length": "999999999999"}
            declared = await client.post(path, content=b"{}", headers=large)
            dripped = await client.post(path, content=slowly(), headers=headers)
            return declared.status_code, dripped.status_code, dripped.json()["error"]["message"]

    declared, dripped, message = asyncio.run(run())
    assert (declared, dripped) == (413, 408)
    assert "within 0.2 s" in message


def test_keys_are_asked_for_on_every_path_but_health(tmp_path: pathlib.Path) -> None:
    config = dataclasses.replace(CONFIG, api_key_file=str(key_file(tmp_path)))

    async def run() -> None:
        async with FakeServer(config).client() as client:
            paths = ["/", "/metrics", "/v1/models", "/openapi.json", "/nothing", "/health/other"]
            for path in paths:
                response = await client.get(path)
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"].startswith("Basic")
            assert (await post(client, chat())).status_code == 401
            for path in ("/health", "/health/live"):
                assert (await client.get(path)).status_code == 200
            for key in ("secret-secret-secre", "secret-secret-secret!", "# ours", ""):
                headers = {"authorization": f"Bearer {key}"}
                assert (await client.get("/v1/models", headers=headers)).status_code == 401
            for key in ("secret-secret-secret", "another-key-of-ours"):
                headers = {"authorization": f"Bearer {key}"}
                assert (await client.get("/v1/models", headers=headers)).status_code == 200
            basic = await client.get("/", auth=("anybody", "secret-secret-secret"))
            assert basic.status_code == 200

    asyncio.run(run())


@pytest.mark.parametrize(("content", "reason"), [("# none\n", "no key"), ("short", "5 characters")])
def test_key_files_that_protect_nothing(tmp_path: pathlib.Path, content: str, reason: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(ValueError, match=reason):
        FakeServer(dataclasses.replace(CONFIG, api_key_file=str(path)))
