"""A load test of the server: requests that arrive as a Poisson process, at several rates.

    python benchmarks/serving.py

Every arm is a server in a process of its own, on loopback, for one reduction. Questions about
random images arrive at each of `--rates` for `--seconds`, whether or not earlier ones were
answered, and are streamed; every one is asked for `--new_tokens` tokens. A rate is reported with
percentiles of the time to the first token and of the time per further token. The last row of an
arm is saturation: `--clients` who always ask again. `one slot` is the first reduction on a server
that decodes one sequence at a time: an engine without continuous batching.

The random images of a converted model or the miniature decide how many visual tokens an adaptive
reduction keeps; `visual_tokens` is their mean.
"""

import argparse
import asyncio
import base64
import dataclasses
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
from measuring import add_arguments, report
from PIL import Image

QUESTION = "How many digits are there?"
IMAGES = 16


@dataclasses.dataclass
class Timing:
    """One answer: seconds to its first token and to its end, tokens, visual tokens."""

    first: float
    whole: float
    tokens: int
    visual: int


class Server:
    """A server in a process; its address is `url`."""

    def __init__(self, checkpoint: str, reduction: str, slots: int, new_tokens: int) -> None:
        flags = ["--checkpoint", checkpoint, "--reductions", reduction, "--slots", str(slots)]
        flags += ["--port", "0", "--max_queue", "100000", "--max_new_tokens", str(new_tokens)]
        flags += ["--queue_timeout_s", "3600", "--request_timeout_s", "3600"]
        flags += ["--max_prompt_tokens", "128", "--served_model_name", "model"]
        command = [sys.executable, "-m", "prumerge_jax.serve", *flags]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.url = self._wait_for(r"listening on (\S+)")
        self._wait_for("(ready)")
        # From here on nobody reads what it logs.
        self.pump = subprocess.Popen(["cat"], stdin=self.process.stderr, stdout=subprocess.DEVNULL)

    def _wait_for(self, pattern: str) -> str:
        assert self.process.stderr is not None
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if found := re.search(pattern, line):
                return found[1]
        raise ValueError(f"the server did not start: {''.join(lines[-5:])}")

    def close(self) -> None:
        """Ends the process."""
        self.process.terminate()
        self.process.wait()
        self.pump.wait()


def bodies(new_tokens: int) -> list[dict[str, Any]]:
    """One request for each of a few random images."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(IMAGES):
        buffer = io.BytesIO()
        blobs = Image.fromarray(rng.integers(0, 256, (12, 12, 3)).astype(np.uint8))
        blobs.resize((336, 336)).save(buffer, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        picture = {"type": "image_url", "image_url": {"url": url}}
        content = [picture, {"type": "text", "text": QUESTION}]
        made.append(
            {
                "model": "model",
                "messages": [{"role": "user", "content": content}],
                "max_tokens": new_tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        )
    return made


async def ask(client: httpx.AsyncClient, body: dict[str, Any]) -> Timing:
    """Streams one answer."""
    began, first, usage = time.perf_counter(), 0.0, {}
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            first = first or time.perf_counter() - began
            if line.startswith("data: {"):
                usage = json.loads(line[6:]).get("usage") or usage
    visual = usage["prompt_tokens_details"]["image_tokens"]
    return Timing(first, time.perf_counter() - began, usage["completion_tokens"], visual)


async def arrivals(url: str, asked: Sequence[dict], rate: float, seconds: float) -> list[Timing]:
    """Answers to requests that arrive at a rate."""
    rng = np.random.default_rng(1)
    gaps = rng.exponential(1 / rate, max(1, int(rate * seconds)))
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        waiting = []
        for number, gap in enumerate(gaps):
            await asyncio.sleep(gap)
            waiting.append(asyncio.create_task(ask(client, asked[number % len(asked)])))
        return await asyncio.gather(*waiting)


async def saturation(url: str, asked: Sequence[dict], clients: int, seconds: float) -> list[Timing]:
    """Answers to clients who always ask again."""
    until = time.perf_counter() + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:

        async def one(first: int) -> list[Timing]:
            answers = []
            while time.perf_counter() < until:
                answers.append(await ask(client, asked[(first + len(answers)) % len(asked)]))
            return answers

        several = await asyncio.gather(*map(one, range(clients)))
    return [timing for answers in several for timing in answers]


def row(arm: str, load: str, timings: Sequence[Timing], seconds: float) -> dict[str, Any]:
    """A row of the report."""
    first = 1e3 * np.quantile([timing.first for timing in timings], [0.5, 0.95, 0.99])
    further = [
        1e3 * (timing.whole - timing.first) / (timing.tokens - 1)
        for timing in timings
        if timing.tokens > 1
    ]
    return {
        "reduction": arm,
        "load": load,
        "requests_per_s": len(timings) / seconds,
        "first_ms": float(first[0]),
        "first_ms_p95": float(first[1]),
        "first_ms_p99": float(first[2]),
        "token_ms_p95": float(np.quantile(further, 0.95)) if further else 0.0,
        "tokens_per_s": sum(timing.tokens for timing in timings) / seconds,
        "visual_tokens": float(np.mean([timing.visual for timing in timings])),
    }


def measured(server: Server, arm: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of an arm."""
    asked = bodies(arguments.new_tokens)
    asyncio.run(saturation(server.url, asked, 4, 1.0))  # first touches
    rows = []
    for rate in arguments.rates:
        print(f"{arm}: {rate:g} requests/s for {arguments.seconds:g} s", flush=True)
        began = time.perf_counter()
        timings = asyncio.run(arrivals(server.url, asked, rate, arguments.seconds))
        rows.append(row(arm, f"{rate:g}/s", timings, time.perf_counter() - began))
    print(f"{arm}: {arguments.clients} clients for {arguments.seconds:g} s", flush=True)
    began = time.perf_counter()
    timings = asyncio.run(saturation(server.url, asked, arguments.clients, arguments.seconds))
    rows.append(row(arm, "saturated", timings, time.perf_counter() - began))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--checkpoint", default="miniature", help="model directory, or miniature")
    parser.add_argument("--reductions", nargs="+", default=["full", "prumerge+", "prumerge"])
    parser.add_argument("--rates", nargs="+", type=float, default=[5.0, 20.0], help="requests/s")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load")
    parser.add_argument("--clients", type=int, default=32, help="at saturation")
    parser.add_argument("--slots", type=int, default=16, help="sequences decoded at once")
    parser.add_argument("--new_tokens", type=int, default=24, help="most tokens of an answer")
    arguments = parser.parse_args(argv)
    arms = [(reduction, reduction, arguments.slots) for reduction in arguments.reductions]
    arms.append((f"{arguments.reductions[0]}, one slot", arguments.reductions[0], 1))
    loads = len(arguments.rates) + 1
    seconds = len(arms) * (30 + loads * arguments.seconds)
    print(f"{len(arms)} servers, {loads} loads each: about {seconds / 60:.0f} minutes", flush=True)
    rows: list[dict[str, Any]] = []
    for arm, reduction, slots in arms:
        server = Server(arguments.checkpoint, reduction, slots, arguments.new_tokens)
        try:
            rows += measured(server, arm, arguments)
        finally:
            server.close()
    report("serving", arguments, rows)


if __name__ == "__main__":
    main()
