"""A server in a process of its own, the miniature behind it, and the clients that it will have."""

import asyncio
import base64
import collections
import concurrent.futures
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from PIL import Image

from prumerge_jax.serve import logs
from prumerge_jax.serve.__main__ import main
from tests.serve.fakes import miniature

if TYPE_CHECKING:  # seconds that no other test pays
    import openai
    import schemathesis

pytestmark = pytest.mark.slow

REDUCTIONS = ("prumerge", "full", "cover:tokens=32")
QUESTIONS = ("Is there a 7?", "How many digits are there?", "Which digit is at the top left?")
MOST = 24


class Process:
    """A server in a process.

    Attributes:
      url: its address.
      lines: what it has written.
    """

    def __init__(self, *flags: str) -> None:
        command = [sys.executable, "-m", "prumerge_jax.serve", "--port", "0", "--slots", "8"]
        command += ["--max_prompt_tokens", "192", "--max_new_tokens", str(MOST), "--log_json"]
        command += ["--reductions", *REDUCTIONS, *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self.wait_for(r"listening on (http://[\d.:]+)")
        self.wait_for(r"(ready)")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def wait_for(self, pattern: str, seconds: float = 240) -> str:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for line in list(self.lines):
                if found := re.search(pattern, line):
                    return found[1]
            assert self.process.poll() is None, "".join(self.lines)
            time.sleep(0.1)
        raise AssertionError(f"no {pattern} in {self.lines}")

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics").text
        return sum(
            float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(name)
        )

    def resident_megabytes(self) -> float:
        with open(f"/proc/{self.process.pid}/status") as status:
            (line,) = [line for line in status if line.startswith("VmRSS")]
        return int(line.split()[1]) / 1024

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    process = Process("--max_image_bytes", "100000")
    yield process
    process.close()


@pytest.fixture(scope="module")
def client(server: Process) -> "openai.OpenAI":
    import openai

    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def image(seed: int) -> bytes:
    """A PNG of blobs."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (12, 10, 3)).astype(np.uint8))
    buffer = io.BytesIO()
    small.resize((100, 120)).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def messages(number: int, text: str) -> list[dict]:
    picture = {"type": "image_url", "image_url": {"url": data_url(image(number))}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": text}]}]


def expected(number: int, text: str, **options: object) -> str:
    (answer,) = miniature().generate([image(number)], [text], max_new_tokens=MOST, **options)
    return answer


def test_the_official_client(client: "openai.OpenAI") -> None:
    asked = {"model": "miniature", "messages": messages(0, QUESTIONS[1]), "max_tokens": MOST}
    plain = client.chat.completions.create(**asked)
    answer = expected(0, QUESTIONS[1])
    assert plain.choices[0].message.content == answer
    assert plain.usage.prompt_tokens_details.image_tokens_full == 144
    assert 0 < plain.usage.prompt_tokens_details.image_tokens < 144
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answer
    assert last.usage.completion_tokens == plain.usage.completion_tokens
    stop = answer[len(answer) // 2]
    stopped = client.chat.completions.create(**asked, stop=stop)
    assert stopped.choices[0].message.content == answer[: answer.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    drawn = client.chat.completions.create(**asked, temperature=1.3, top_p=0.9, seed=11)
    assert drawn.choices[0].message.content == expected(
        0, QUESTIONS[1], temperature=1.3, top_p=0.9, seed=11
    )
    reduced = client.chat.completions.create(**asked, extra_body={"reduction": "cover:tokens=32"})
    assert reduced.choices[0].message.content == expected(
        0, QUESTIONS[1], reduction="cover:tokens=32"
    )
    assert reduced.usage.prompt_tokens_details.image_tokens == 32
    by_name = client.chat.completions.create(**asked | {"model": "miniature@full"})
    assert by_name.choices[0].message.content == expected(0, QUESTIONS[1], reduction="full")
    assert [model.id for model in client.models.list()] == ["miniature"]


def test_two_turns_and_refusals_by_the_official_client(client: "openai.OpenAI") -> None:
    import openai

    asked = {"model": "miniature", "max_tokens": MOST}
    turns = messages(0, QUESTIONS[1])
    first = client.chat.completions.create(**asked, messages=turns)
    turns += [first.choices[0].message, {"role": "user", "content": QUESTIONS[0]}]
    second = client.chat.completions.create(**asked, messages=turns)
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    again = client.chat.completions.create(**asked, messages=turns)
    assert again.choices[0].message.content == second.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="unsupported parameter 'tools'"):
        client.chat.completions.create(**asked, messages=turns, tools=[])
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**asked | {"model": "gpt-5"}, messages=turns)
    broken = {"type": "image_url", "image_url": {"url": data_url(b"broken")}}
    with pytest.raises(openai.UnprocessableEntityError, match="not a readable image"):
        client.chat.completions.create(**asked, messages=[{"role": "user", "content": [broken]}])


def test_answers_do_not_depend_on_what_runs_beside_them(client: "openai.OpenAI") -> None:
    cases = [
        (number, QUESTIONS[number % 3], reduction, temperature)
        for reduction in REDUCTIONS
        for temperature in (0.0, 1.0)
        for number in range(8)
    ]

    def ask(case: tuple[int, str, str, float]) -> str:
        number, text, reduction, temperature = case
        answer = client.chat.completions.create(
            model=f"miniature@{reduction}",
            messages=messages(number, text),
            max_tokens=MOST,
            temperature=temperature,
            seed=number,
        )
        return answer.choices[0].message.content

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, cases))
    for first in range(0, len(cases), 8):
        numbers, texts, reductions, temperatures = zip(*cases[first : first + 8], strict=True)
        assert answers[first : first + 8] == miniature().generate(
            [image(number) for number in numbers],
            list(texts),
            max_new_tokens=MOST,
            reduction=reductions[0],
            temperature=temperatures[0],
            seed=0,  # prompt i draws with i, as case i of the eight did
        )


KINDS = {"whole": 0.46, "stream": 0.32, "cancel": 0.10, "broken": 0.05, "large": 0.05, "kill": 0.02}


async def one(http: httpx.AsyncClient, kind: str, number: int) -> tuple[int, str | None]:
    """The status and, of those that are complete, the text."""
    reduction = REDUCTIONS[number % 3]
    body = {
        "model": f"miniature@{reduction}",
        "messages": messages(number % 6, QUESTIONS[number % 3]),
        "max_tokens": MOST,
        "stream": kind in ("stream", "kill"),
    }
    path = "/v1/chat/completions"
    if kind in ("broken", "large"):
        content = image(number)[:-40] if kind == "broken" else os.urandom(150_000)
        body["messages"][0]["content"][0]["image_url"]["url"] = data_url(content)
    if kind == "cancel":
        try:
            async with asyncio.timeout(random.Random(number).uniform(0, 0.3)):
                return (await http.post(path, json=body)).status_code, None
        except TimeoutError:
            return 0, None
    if kind == "kill":
        async with http.stream("POST", path, json=body) as response:
            async for _ in response.aiter_bytes():
                return response.status_code, None
    response = await http.post(path, json=body)
    if response.status_code != 200:
        return response.status_code, None
    if kind == "whole":
        return 200, response.json()["choices"][0]["message"]["content"]
    *events, done = response.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    return 200, "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def test_five_hundred_requests_of_all_kinds(server: Process) -> None:
    kinds = random.Random(0).choices(list(KINDS), list(KINDS.values()), k=500)
    statuses: collections.Counter[tuple[str, int]] = collections.Counter()

    async def run(numbers: range) -> list[tuple[int, str | None]]:
        free = asyncio.Semaphore(32)

        async def limited(number: int) -> tuple[int, str | None]:
            async with free:
                return await one(http, kinds[number], number)

        async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
            return await asyncio.gather(*map(limited, numbers))

    compiled = server.metric("prumerge_compilations")
    results = asyncio.run(run(range(200)))  # what grows once has grown
    resident = [server.resident_megabytes()]
    for start in (200, 300, 400):
        results += asyncio.run(run(range(start, start + 100)))
        resident.append(server.resident_megabytes())
    answers = {
        (number % 6, number % 3): expected(
            number % 6, QUESTIONS[number % 3], reduction=REDUCTIONS[number % 3]
        )
        for number in range(6)
    }
    for number, (kind, (status, text)) in enumerate(zip(kinds, results, strict=True)):
        statuses[kind, status] += 1
        if kind in ("whole", "stream"):
            assert (status, text) == (200, answers[number % 6, number % 3]), number
    assert {kind_status for kind_status in statuses if kind_status[0] in ("broken", "large")} == {
        ("broken", 422),
        ("large", 413),
    }
    for _ in range(100):
        left = server.metric("prumerge_num_requests_")
        if not left:
            break
        time.sleep(0.1)
    assert left == 0
    assert server.metric("prumerge_compilations") == compiled
    assert server.metric("prumerge_kv_pages_used") == 0
    # What leaks grows with every hundred requests; the most that waits at once grows by chance.
    assert np.diff(resident).min() < 13
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_the_schema_finds_no_fault_of_the_servers(server: Process) -> None:
    import schemathesis

    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    failures: list[tuple[str, int, str]] = []
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def run(case: "schemathesis.Case") -> None:
            response = case.call(timeout=60)
            if response.status_code >= 500:
                failures.append((case.operation.label, response.status_code, response.text))

        run()
    assert not failures


def test_at_sigterm_running_requests_finish(server: Process) -> None:
    """The last test of this server: it ends."""
    path = f"{server.url}/v1/chat/completions"
    body = {
        "model": "miniature@full",
        "messages": messages(1, QUESTIONS[1]),
        "max_tokens": MOST,
        "stream": True,
        "temperature": 2.0,
    }
    texts = []

    def ask() -> None:
        texts.append(httpx.post(path, json=body, timeout=60).text)

    threads = [threading.Thread(target=ask) for _ in range(24)]
    for thread in threads:
        thread.start()
    while not server.metric("prumerge_num_requests_"):
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert server.process.wait(timeout=60) == 0, "".join(server.lines)
    whole = [text for text in texts if text.endswith("data: [DONE]\n\n")]
    refused = [text for text in texts if "the server is shutting down" in text]
    assert whole
    assert len(whole) + len(refused) == 24, texts


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "/nowhere"], "/nowhere"),
        (["--reductions", "prunerge"], "did you mean 'prumerge'?"),
        (["--api_key_file", "/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "configure", lambda as_json: None)  # this process has its own
    monkeypatch.setattr(sys, "argv", ["prumerge-serve", "--port", "0", *flags])
    with pytest.raises(SystemExit) as end:
        main()
    assert str(end.value).startswith("prumerge-serve: ")
    assert message in str(end.value)
    assert "\n" not in str(end.value)


def test_a_mistake_is_all_that_a_process_writes() -> None:
    command = [sys.executable, "-m", "prumerge_jax.serve", "--port", "0", "--conversation", "v9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("prumerge-serve: ")
    assert "v9" in done.stderr
    assert done.stderr.count("\n") == 1
