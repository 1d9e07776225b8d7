"""What the server counts, as Prometheus reads it; names as vLLM's where the meaning is the same."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 600.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_VISUAL_TOKENS = (0, 8, 16, 32, 64, 96, 128, 144, 192, 256, 384, 576, 1152, 2304, 2880)
_COMPILED = "/jax/core/compile/backend_compile_duration"

CONTENT_TYPE = CONTENT_TYPE_LATEST

InFlight = Callable[[], tuple[int, int]]
"""Numbers of requests that are running and that wait."""


class Metrics:
    """The server's metrics, in a registry of their own.

    Args:
      in_flight: numbers of running and of waiting requests.
      weights: identity of the weights.
      pages_used: pages of keys and values that sequences hold.
      row_fill: share of the tokens of packed rows that are no padding.
    """

    def __init__(
        self,
        in_flight: InFlight,
        weights: str,
        pages_used: Callable[[], int],
        row_fill: Callable[[], float],
    ) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Now(in_flight))
        pages = Gauge("prumerge_kv_pages_used", "Pages held.", registry=self.registry)
        pages.set_function(pages_used)
        fill = Gauge("prumerge_row_fill_ratio", "Rows without padding.", registry=self.registry)
        fill.set_function(row_fill)
        self.success = self._counter("request_success", "Requests answered.", "finished_reason")
        self.errors = self._counter("request_errors", "Requests refused or failed.", "code")
        self.rejected_images = self._counter("images_rejected", "Images refused.", "reason")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens, visual ones included.")
        self.new_tokens = self._counter("generation_tokens", "Tokens generated.")
        self.queue_time = self._histogram("request_queue_time_seconds", "Until the first token.")
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token."
        )
        self.token_time = self._histogram(
            "inter_token_latency_seconds", "Seconds per token after the first.", _TOKEN_SECONDS
        )
        self.latency = self._histogram("e2e_request_latency_seconds", "From arrival to the end.")
        self.image_time = self._histogram("image_decode_seconds", "Fetching and decoding an image.")
        self.visual_tokens = Histogram(
            "prumerge_visual_tokens",
            "Visual tokens of an image.",
            ["reduction"],
            buckets=_VISUAL_TOKENS,
            registry=self.registry,
        )
        info = Gauge("prumerge_weights_info", "The weights.", ["sha"], registry=self.registry)
        info.labels(weights).set(1)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def serve(self, host: str, port: int) -> None:
        """Serves the metrics on a port of their own, on a thread."""
        start_http_server(port, addr=host, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"prumerge_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        return Histogram(f"prumerge_{name}", text, buckets=buckets, registry=self.registry)


class _Now(Collector):
    """What is asked for when the metrics are read."""

    def __init__(self, in_flight: InFlight) -> None:
        self._in_flight = in_flight

    def collect(self) -> Iterator[Any]:
        running, waiting = self._in_flight()
        yield GaugeMetricFamily("prumerge_num_requests_running", "In the engines.", running)
        yield GaugeMetricFamily("prumerge_num_requests_waiting", "Before the engines.", waiting)
        yield CounterMetricFamily(
            "prumerge_compilations", "Programs compiled; constant after the start.", compilations()
        )


_compiled = 0
_lock = threading.Lock()


def compilations() -> int:
    """Number of programs that this process has compiled, or read from a cache of compiled ones."""
    return _compiled


def _count(event: str, *_: Any, **__: Any) -> None:
    global _compiled
    if event == _COMPILED:
        with _lock:
            _compiled += 1


jax.monitoring.register_event_duration_secs_listener(_count)
