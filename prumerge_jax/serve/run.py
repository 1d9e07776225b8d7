"""The server as a process: loading, listening, draining, its end."""

import logging
import socket
import time
from importlib import metadata
from types import FrameType

import uvicorn

from prumerge_jax.conversion.miniature import model_directory
from prumerge_jax.llava import Llava
from prumerge_jax.serve import logs
from prumerge_jax.serve.app import Server
from prumerge_jax.serve.config import ServeConfig
from prumerge_jax.serve.engines import engine_config
from prumerge_jax.serve.images import Images
from prumerge_jax.serve.keys import Keys
from prumerge_jax.serve.metrics import Metrics
from prumerge_jax.serve.model import ServedModel
from prumerge_jax.serve.service import Service
from prumerge_jax.store.manifest import weights_identity

_LOG = logging.getLogger(__name__)

_CLOSING_SECONDS = 2
"""Time that connections have to close after the last answer, or after the grace."""


def serve(config: ServeConfig) -> int:
    """Serves until SIGTERM or SIGINT.

    Returns:
      The exit status: 0 after a drain, 1 where the engines could not be prepared.

    Raises:
      ValueError, OSError: a file or a value of the configuration cannot be used.
    """
    logs.configure(config.log_json)
    keys = Keys(config.api_key_file)
    listening = listen(config.host, config.port)
    llava = load(config)
    weights = weights_identity(model_directory(config.checkpoint))
    return serve_model(ServedModel(llava, config), weights, keys, listening)


def load(config: ServeConfig) -> Llava:
    """The model that a configuration names.

    Raises:
      ValueError: as `Llava.load`.
    """
    return Llava.load(
        config.checkpoint,
        dtype=config.dtype,
        engine=engine_config(config),
        quantize=config.quantize,
    )


def serve_model(model: ServedModel, weights: str, keys: Keys, listening: socket.socket) -> int:
    """Serves a model on a bound socket until SIGTERM or SIGINT.

    Args:
      model: the model, under the limits of its configuration.
      weights: identity of the weights.
      keys: who may ask.
      listening: see `listen`.

    Returns:
      See `serve`.
    """
    config, scheduler = model.config, model.scheduler()
    metrics = Metrics(scheduler.in_flight, weights, model.pages_used, model.row_fill)
    images = Images(config)
    images.warm_up(model.processor(next(iter(model.reductions)), None))
    service = Service(config, model, scheduler, images, metrics)
    server = Server(service, keys, f"{weights[:12]}-{metadata.version('prumerge-jax')}")
    if config.metrics_port is not None:
        metrics.serve(config.host, config.metrics_port)
    process = _Process(server, config, listening)
    scheduler.start()
    process.run(sockets=[listening])
    scheduler.stop(_CLOSING_SECONDS)
    return 1 if process.failed else 0


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, before anything expensive.

    Raises:
      OSError: the address cannot be had; the message names it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"--host {host} --port {port}: {reason}") from error
    return listening


class _Process(uvicorn.Server):
    """uvicorn, which at a signal first lets running requests finish.

    Attributes:
      failed: the engines could not be prepared.
    """

    def __init__(self, server: Server, config: ServeConfig, listening: socket.socket) -> None:
        super().__init__(
            uvicorn.Config(
                server.app,
                log_config=None,
                access_log=False,
                server_header=False,
                limit_concurrency=config.max_connections,
                timeout_graceful_shutdown=_CLOSING_SECONDS,
                ws="none",
            )
        )
        self._server, self._grace_s, self._listening = server, config.grace_s, listening
        self._drain_until: float | None = None
        self._is_ready = self.failed = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second one ends at once."""
        if self._drain_until is not None:
            self.should_exit = self.force_exit = True
            return
        self._drain_until = time.monotonic() + self._grace_s
        self._server.admission.draining = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens."""
        await super().startup(sockets)
        host, port = self._listening.getsockname()[:2]
        _LOG.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second; says whether to end."""
        self._watch_start()
        if self._drain_until is not None and not self.should_exit:
            left = self._server.admission.requests
            if not left or time.monotonic() > self._drain_until:
                _LOG.info("ending; %d requests are unfinished", left)
                self.should_exit = True
        return await super().on_tick(counter)

    def _watch_start(self) -> None:
        """Tells once when the engines are ready, or ends where they cannot be."""
        started = self._server.service.scheduler.started
        if self._is_ready or self.failed or not started.done():
            return
        error = started.exception()
        if error is None:
            self._is_ready = True
            _LOG.info("ready: %s", " ".join(self._server.service.model.reductions))
            return
        self.failed = self.should_exit = True
        _LOG.error("the engines cannot be prepared", exc_info=error)
