"""A load test of the server: requests that arrive as a Poisson process, at several rates.

    python benchmarks/serving.py
    python benchmarks/serving.py --rates 0.25 0.5 0.8 1.1 --seconds 20 --clients 16 --static
    python benchmarks/serving.py --geometry miniature --rates 5 20 50

One server on loopback (`served.py`) runs all of `--reductions`; their loads come one after the
other. Questions about scenes of digits arrive at each of `--rates` for `--seconds`, whether or not
earlier ones were answered, and are streamed. Every reduction gets the same requests at the same
times; one that does not keep up with a rate gets no higher one. The last load is saturation:
`--clients` who always ask again. With `--static` a second server runs the last reduction in static
batches, which begin and end together: an engine without continuous batching.

Sizes are those of `models.py`, with random weights and drawn counts of visual tokens, or the
miniature with what it finds in the scenes. Answers have 1 to `--new_tokens` tokens, equally often.

Columns: `requests_per_s` is what was answered over the time until all were; `first_ms` the time to
the first token, from before the request is sent, with percentiles; `token_ms` the time per further
token. The notes say how many requests per second a reduction serves within the time to the first
token that `full` needs for the 95th percentile.
"""

import argparse
import asyncio
import base64
import dataclasses
import json
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
from measuring import add_arguments, begin, progress, report

from prumerge_jax.digits.questions import draw_with_questions

FULL = "full"
SCENES = 64
KEEPS_UP = 0.6
"""Share of a rate that a server answers that keeps up; the end of a load, after the last arrival,
is part of its time."""
START_SECONDS = 120
"""About what it takes to compile everything."""


@dataclasses.dataclass
class Timing:
    """One answer: seconds to its first token and to its end, tokens, visual tokens."""

    first: float
    whole: float
    tokens: int
    visual: int


class Server:
    """A server in a process; its address is `url`."""

    def __init__(
        self, reductions: Sequence[str], arguments: argparse.Namespace, *, static: bool = False
    ) -> None:
        flags = ["--geometry", arguments.geometry, "--reductions", *reductions]
        flags += ["--slots", str(arguments.slots), "--new_tokens", str(arguments.new_tokens)]
        program = pathlib.Path(__file__).with_name("served.py")
        command = [sys.executable, str(program), *flags, *(["--static"] if static else [])]
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
    """Requests about scenes, without the model's name."""
    lengths = np.random.default_rng(0).integers(1, new_tokens + 1, SCENES)
    made = []
    for index, length in enumerate(lengths.tolist()):
        scene, questions = draw_with_questions("test", index, seed=0)
        url = f"data:image/png;base64,{base64.b64encode(scene.png()).decode()}"
        picture = {"type": "image_url", "image_url": {"url": url}}
        content = [picture, {"type": "text", "text": questions[0].text}]
        made.append(
            {
                "messages": [{"role": "user", "content": content}],
                "max_tokens": length,
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
    gaps = rng.exponential(1 / rate, max(1, round(rate * seconds)))
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        waiting = []
        for number, gap in enumerate(gaps):
            await asyncio.sleep(gap)
            waiting.append(asyncio.create_task(ask(client, asked[number % len(asked)])))
        return await asyncio.gather(*waiting)


async def saturation(url: str, asked: Sequence[dict], clients: int, seconds: float) -> list[Timing]:
    """Answers to clients who ask again until the time is over."""
    until = time.perf_counter() + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:

        async def one(first: int) -> list[Timing]:
            answers = []
            while not answers or time.perf_counter() < until:
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
    token = np.quantile(further, [0.5, 0.95]) if further else np.zeros(2)
    return {
        "reduction": arm,
        "load": load,
        "requests": len(timings),
        "requests_per_s": len(timings) / seconds,
        "first_ms": float(first[0]),
        "first_ms_p95": float(first[1]),
        "first_ms_p99": float(first[2]),
        "token_ms": float(token[0]),
        "token_ms_p95": float(token[1]),
        "tokens_per_s": sum(timing.tokens for timing in timings) / seconds,
        "visual_tokens": float(np.mean([timing.visual for timing in timings])),
    }


def measured(
    server: Server, reduction: str, arm: str, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """The rows of an arm."""
    asked = [{**body, "model": f"model@{reduction}"} for body in bodies(arguments.new_tokens)]
    asyncio.run(saturation(server.url, asked, 2, 0.0))  # first touches
    rows = []
    for rate in sorted(arguments.rates):
        began = time.perf_counter()
        timings = asyncio.run(arrivals(server.url, asked, rate, arguments.seconds))
        rows.append(row(arm, f"{rate:g}/s", timings, time.perf_counter() - began))
        progress(f"{arm}: {rate:g} requests/s, {len(timings)} in {_since(began)}")
        if rows[-1]["requests_per_s"] < KEEPS_UP * rate:
            break
    began = time.perf_counter()
    timings = asyncio.run(saturation(server.url, asked, arguments.clients, arguments.seconds))
    rows.append(row(arm, "saturated", timings, time.perf_counter() - began))
    progress(f"{arm}: {arguments.clients} clients, {len(timings)} requests in {_since(began)}")
    return rows


def _since(began: float) -> str:
    return f"{time.perf_counter() - began:.0f} s"


def notes(rows: Sequence[dict[str, Any]], arguments: argparse.Namespace) -> list[str]:
    """What each reduction serves at the latency that `full` has at its rates."""
    of = {(each["reduction"], each["load"]): each for each in rows}
    lines = []
    for rate in arguments.rates:
        if (FULL, f"{rate:g}/s") not in of:
            continue
        bound = of[FULL, f"{rate:g}/s"]["first_ms_p95"]
        for arm in dict.fromkeys(arm for arm, _ in of if arm != FULL):
            served = max(
                (
                    other
                    for other in arguments.rates
                    if (arm, f"{other:g}/s") in of
                    and of[arm, f"{other:g}/s"]["first_ms_p95"] <= bound
                ),
                default=0.0,
            )
            lines.append(
                f"within the {bound:.0f} ms to the first token (p95) of {FULL} at {rate:g}/s: "
                f"{arm} at {served:g}/s, {served / rate:.1f} times"
            )
    saturated = {
        arm: each["requests_per_s"] for (arm, load), each in of.items() if load == "saturated"
    }
    if FULL in saturated:
        lines += [
            f"saturated: {arm} answers {rate / saturated[FULL]:.1f} times the requests of {FULL}"
            for arm, rate in saturated.items()
            if arm != FULL
        ]
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--geometry", default="mid", help="sizes of models.py, or miniature")
    parser.add_argument("--reductions", nargs="+", default=[FULL, "prumerge+", "prumerge"])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.2, 0.5], help="requests/s")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each load")
    parser.add_argument("--clients", type=int, default=8, help="at saturation")
    parser.add_argument("--slots", type=int, default=16, help="sequences decoded at once")
    parser.add_argument("--new_tokens", type=int, default=32, help="most tokens of an answer")
    parser.add_argument("--static", action="store_true", help="a static server beside them")
    arguments = parser.parse_args(argv)
    begin("serving", __doc__, minutes=5)
    servers = 1 + arguments.static
    loads = (len(arguments.reductions) + arguments.static) * (len(arguments.rates) + 1)
    progress(
        f"{loads} loads of {arguments.seconds:g} s and what is then unanswered, {servers} starts "
        f"of {START_SECONDS} s: about "
        f"{(servers * START_SECONDS + 1.5 * loads * arguments.seconds) / 60:.0f} minutes"
    )
    rows: list[dict[str, Any]] = []
    server = Server(arguments.reductions, arguments)
    try:
        for reduction in arguments.reductions:
            rows += measured(server, reduction, reduction, arguments)
    finally:
        server.close()
    if arguments.static:
        last = arguments.reductions[-1]
        server = Server([last], arguments, static=True)
        try:
            rows += measured(server, last, f"{last}, static", arguments)
        finally:
            server.close()
    report("serving", arguments, rows, notes=notes(rows, arguments))


if __name__ == "__main__":
    main()
