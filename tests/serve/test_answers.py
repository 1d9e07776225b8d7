"""Answers over HTTP, whole and streamed: text, usage, stop strings, time, room, disconnection."""

import asyncio
import dataclasses
import json
import time

import httpx
import jax
import jax.numpy as jnp
import pytest

from prumerge_jax.serve import service
from prumerge_jax.serve.config import ServeConfig, parse_flags
from prumerge_jax.serve.run import load
from prumerge_jax.serve.scheduler import Ticket
from tests.serve.fakes import CONFIG, VISUAL_TOKENS, FakeServer, chat, data_url, miniature, png

IMAGE = data_url(png())


def text_of(server: FakeServer, **fields: object) -> str:
    (response,) = server.ask(chat(**fields))
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def events_of(response: httpx.Response) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def test_a_whole_answer() -> None:
    (response,) = FakeServer().ask(chat(image=IMAGE, seed=3))
    body = response.json()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    assert body["model"] == "miniature"
    assert body["choices"][0]["finish_reason"] == "length"
    usage = body["usage"]
    details = {"image_tokens": VISUAL_TOKENS, "image_tokens_full": 144}
    assert usage["prompt_tokens_details"] == details
    assert usage["completion_tokens"] == 7
    assert usage["total_tokens"] == usage["prompt_tokens"] + 7
    assert response.headers["x-prumerge-visual-tokens"] == str(VISUAL_TOKENS)
    assert body["id"].endswith(response.headers["x-request-id"])


def test_a_stream_is_the_whole_answer() -> None:
    fields = {"image": IMAGE, "seed": 3, "max_tokens": 31}
    whole = text_of(FakeServer(), **fields)
    options = {"include_usage": True}
    (response,) = FakeServer().ask(chat(**fields, stream=True, stream_options=options))
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage = events_of(response)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0]["role"] == "assistant"
    assert "".join(delta.get("content", "") for delta in deltas) == whole
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (
        len(chunks) - 1
    )
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert deltas[-1] == {}
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 31
    assert all(chunk["usage"] is None for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_the_work(stream: bool) -> None:
    fields = {"max_tokens": 900, "seed": 1}
    whole = text_of(FakeServer(), **fields)
    stop = whole[20:23]
    server = FakeServer()
    (response,) = server.ask(chat(**fields, stop=[stop, "\0"], stream=stream))
    if stream:
        chunks = events_of(response)
        text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = response.json()["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
        assert response.json()["usage"]["completion_tokens"] < 100
    assert text == whole[: whole.index(stop)]
    assert reason == "stop"
    assert server.cores[0].cancelled == {0}


def test_the_reduction_by_field_by_name_and_by_default() -> None:
    server = FakeServer()
    asked = []
    submit = server.scheduler.submit

    def watched(ticket: Ticket) -> None:
        asked.append(ticket.request.reduction)
        submit(ticket)

    server.scheduler.submit = watched
    bodies = [
        chat(),
        chat(reduction="full"),
        chat(model="miniature@cover:tokens=32"),
        chat(model="miniature@full", reduction="full"),
        chat(reduction="cover:tokens=032"),
    ]
    assert {response.status_code for response in server.ask(*bodies)} == {200}
    assert asked == ["prumerge", "full", "cover:tokens=32", "full", "cover:tokens=32"]


def test_prompts_are_those_of_the_library() -> None:
    server = FakeServer()
    requests = []
    submit = server.scheduler.submit
    server.scheduler.submit = lambda ticket: (requests.append(ticket.request), submit(ticket))[1]
    two_turns = chat(image=IMAGE)
    two_turns["messages"] += [
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": [{"type": "text", "text": text} for text in ("And", "?")]},
    ]
    instructed = chat()
    instructed["messages"].insert(0, {"role": "system", "content": "Be brief."})
    for response in server.ask(chat(image=IMAGE), two_turns, instructed):
        assert response.status_code == 200, response.text
    tokenizer = miniature().tokenizer
    opening = (
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions."
    )
    asked = "USER: <image>\nHow many digits? ASSISTANT:"
    prompts = [
        f"{opening} {asked}",
        f"{opening} {asked} Three.</s>USER: And\n? ASSISTANT:",
        "Be brief. USER: How many digits? ASSISTANT:",
    ]
    for request, prompt in zip(requests, prompts, strict=True):
        assert request.token_ids.tolist() == tokenizer.encode_prompt(prompt)
    (image,) = requests[0].images
    expected = miniature().processor("pad", "full")(png()).crops[0]
    assert (image.crops[0] == expected).all()


def test_models_health_metrics_and_the_page() -> None:
    async def run() -> list[httpx.Response]:
        server = FakeServer()
        async with server.client() as client:
            server.scheduler.started.result(timeout=20)
            await client.post("/v1/chat/completions", json=chat(image=IMAGE))
            await client.post("/v1/chat/completions", json=chat(n=2))
            paths = ("/v1/models", "/v1/models/miniature", "/health", "/health/live", "/metrics")
            return [await client.get(path) for path in (*paths, "/", "/openapi.json")]

    models, model, health, live, metrics, page, openapi = asyncio.run(run())
    (entry,) = models.json()["data"]
    assert entry == model.json()
    assert entry["id"] == "miniature"
    assert entry["prumerge"]["reductions"] == list(CONFIG.reductions)
    assert health.json() == live.json() == {"status": "ok"}
    for line in (
        'prumerge_request_success_total{finished_reason="length"} 1.0',
        'prumerge_request_errors_total{code="400"} 1.0',
        "prumerge_num_requests_running 0.0",
        "prumerge_generation_tokens_total 7.0",
        'prumerge_visual_tokens_count{reduction="prumerge"} 1.0',
        "prumerge_time_to_first_token_seconds_count 1.0",
    ):
        assert line in metrics.text
    assert page.headers["content-type"].startswith("text/html")
    assert "/v1/chat/completions" in openapi.json()["paths"]


def test_an_explanation() -> None:
    body = {"image_url": {"url": IMAGE}, "reduction": "cover:tokens=32"}

    async def run() -> dict:
        async with FakeServer().client() as client:
            return (await client.post("/v1/prumerge/explain", json=body)).json()

    explained = asyncio.run(run())
    expected = miniature().explain(png(), reduction="cover:tokens=32")
    assert explained["grid"] == 12
    assert explained["patch_indices"] == expected.patch_indices.tolist()
    assert explained["assignment"] == expected.assignment.tolist()


def test_a_full_server_says_when_to_come_back() -> None:
    config = dataclasses.replace(CONFIG, max_queue=3)
    server = FakeServer(config, fail=lambda running: time.sleep(0.02))

    async def run() -> list[httpx.Response]:
        async with server.client() as client:
            asked = [
                client.post("/v1/chat/completions", json=chat(max_tokens=20)) for _ in range(8)
            ]
            return await asyncio.gather(*asked)

    responses = asyncio.run(run())
    statuses = sorted(response.status_code for response in responses)
    assert statuses == [200] * 3 + [429] * 5
    full = next(response for response in responses if response.status_code == 429)
    assert full.headers["retry-after"] == "1"
    assert "3 requests are being answered" in full.json()["error"]["message"]


def test_bytes_are_limited_too() -> None:
    config = dataclasses.replace(CONFIG, max_queue_bytes=20_000)
    (response,) = FakeServer(config).ask(chat(image=IMAGE))  # 96 x 96 x 3 bytes of pixels
    assert response.status_code == 429
    assert "of 20,000 bytes, and this one needs 27,648 more" in response.json()["error"]["message"]


def test_too_late_for_the_first_token_and_for_the_last() -> None:
    config = dataclasses.replace(CONFIG, queue_timeout_s=0.2)
    late = FakeServer(config, fail=lambda running: time.sleep(0.6))
    (response,) = late.ask(chat())
    assert response.status_code == 503
    assert "the first token took more than 0.2 s" in response.json()["error"]["message"]
    assert late.cores[0].cancelled == {0}
    config = dataclasses.replace(CONFIG, request_timeout_s=0.4)
    endless = FakeServer(config, fail=lambda running: time.sleep(0.02))
    (response,) = endless.ask(chat(max_tokens=900, stream=True))
    assert response.status_code == 200
    *_, last = response.text.strip().split("\n\n")
    assert (
        "the answer took more than 0.4 s"
        in json.loads(last.removeprefix("data: "))["error"]["message"]
    )


def test_silence_is_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "KEEP_ALIVE_SECONDS", 0.05)
    server = FakeServer(fail=lambda running: time.sleep(0.3))
    (response,) = server.ask(chat(stream=True))
    assert ": keep-alive\n\n" in response.text
    assert response.text.endswith("data: [DONE]\n\n")


def test_an_engine_that_fails_is_told_as_such() -> None:
    def fail(running: list) -> None:
        raise RuntimeError("dead")

    (response,) = FakeServer(fail=fail).ask(chat())
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "the engine failed while it answered; try again"
    (response,) = FakeServer().ask(chat(max_tokens=13))
    assert response.status_code == 400
    assert "13 tokens bring no luck" in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_when_the_client_goes_its_work_ends(stream: bool) -> None:
    server = FakeServer(fail=lambda running: time.sleep(0.01))

    async def run() -> None:
        body = json.dumps(chat(max_tokens=900, stream=stream)).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        gone = asyncio.Event()

        async def receive() -> dict:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict) -> None:
            if message.get("body"):
                gone.set()

        scope = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "http_version": "1.1",
            "scheme": "http", "server": ("test", 80), "client": ("test", 1),
            "raw_path": b"/v1/chat/completions", "root_path": "", "asgi": {"version": "3.0"},
        }  # fmt: skip
        async with server.client():
            if not stream:
                asyncio.get_running_loop().call_later(0.3, gone.set)
            await asyncio.wait_for(server.server.app(scope, receive, send), 20)
            for _ in range(200):
                await asyncio.sleep(0.05)
                if server.cores[0].cancelled and server.scheduler.in_flight() == (0, 0):
                    return

    asyncio.run(run())
    assert server.cores[0].cancelled == {0}
    assert server.scheduler.in_flight() == (0, 0)
    assert server.server.admission.requests == 0


def test_a_server_that_drains_admits_nobody() -> None:
    async def run() -> tuple[httpx.Response, httpx.Response]:
        server = FakeServer()
        async with server.client() as client:
            server.server.admission.draining = True
            return (
                await client.post("/v1/chat/completions", json=chat()),
                await client.get("/health"),
            )

    answer, health = asyncio.run(run())
    assert (answer.status_code, health.status_code) == (503, 503)
    assert "shutting down" in answer.json()["error"]["message"]


def test_flags(capsys: pytest.CaptureFixture) -> None:
    assert parse_flags([]) == ServeConfig()
    config = parse_flags(
        ["--reductions", "full", "cover:tokens=32", "--port", "0", "--log_json",
         "--allow_media_domains", "a.b", "--position_ids", "original", "--slots", "4"]
    )  # fmt: skip
    assert config.reductions == ("full", "cover:tokens=32")
    assert config.allow_media_domains == ("a.b",)
    assert (config.port, config.slots, config.log_json) == (0, 4, True)
    for flags, message in (
        (["--reductions", "prunerge"], "--reductions: unknown reduction 'prunerge'"),
        (["--reductions", "full", "full"], "names one of them twice"),
        (["--max_queue", "0"], "--max_queue is 0; expected a positive number"),
        (["--queue_timeout_s", "nan"], "--queue_timeout_s is nan"),
        (["--quantize", "int9"], "--quantize: unknown format 'int9'; did you mean"),
        (["--allow_media_domains", "*.b"], "'*.b' is not a host name"),
    ):
        with pytest.raises(ValueError, match=message.replace("*", r"\*")):
            parse_flags(flags)
    with pytest.raises(SystemExit):
        parse_flags(["--help"])
    assert "most tokens of an answer" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_is_served_in_fewer_bits() -> None:
    for flags, held in (([], False), (["--quantize", "int8"], True)):
        model = load(parse_flags(flags))
        weights = jax.tree.leaves(model._model.state)
        assert any(each.dtype == jnp.int8 for each in weights) == held
