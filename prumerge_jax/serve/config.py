"""What the server is started with: the model, what clients may choose, and every limit."""

import argparse
import dataclasses
import math
import typing
from collections.abc import Sequence
from typing import Any

from prumerge_jax import reductions
from prumerge_jax.data.packing import PositionIds
from prumerge_jax.messages import quoted
from prumerge_jax.models.quantisation import format_named

_MEBIBYTE = 1 << 20


def _field(default: Any, help_text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text})


@dataclasses.dataclass(frozen=True)
class ServeConfig:
    """Flags of the server; `dataclasses.fields` has what each one means.

    Raises:
      ValueError: a limit that is not positive, a reduction that is not valid, or an unknown
        format; the message names the flag.
    """

    checkpoint: str = _field("miniature", "model directory, or miniature")
    served_model_name: str | None = _field(
        None, "name that clients ask for; by default the last part of --checkpoint"
    )
    host: str = _field("127.0.0.1", "address to listen on")
    port: int = _field(8000, "port to listen on; 0 takes a free one")
    reductions: tuple[str, ...] = _field(
        ("prumerge+", "prumerge", "full"),
        "what clients may choose, the first one by default; all are compiled at the start",
    )
    position_ids: PositionIds = _field(
        "compact", "positions of visual tokens: compact or original (the miniature's)"
    )
    conversation: str | None = _field(None, "chat template; by default the model's")
    dtype: str | None = _field(None, "dtype of weights and computation; by default as stored")
    quantize: str | None = _field(
        None, "format of the decoder's kernels: int8, int8x8, int4 or nf4; by default as stored"
    )
    slots: int | None = _field(None, "sequences decoded at once, for each reduction")
    decode_steps_per_call: int = _field(4, "decode steps between two pieces of a stream")
    max_prompt_tokens: int = _field(1024, "most text tokens of a prompt, visual ones not counted")
    max_new_tokens: int = _field(1024, "most tokens of an answer")
    max_queue: int = _field(256, "requests in the server at once; one more is refused with 429")
    max_queue_bytes: int = _field(
        1024 * _MEBIBYTE, "bytes of bodies and images in the server at once; 429 beyond"
    )
    queue_timeout_s: float = _field(60.0, "seconds until the first token; 503 beyond")
    request_timeout_s: float = _field(600.0, "seconds until the last token")
    max_body_bytes: int = _field(32 * _MEBIBYTE, "bytes of a request body; 413 beyond")
    body_timeout_s: float = _field(10.0, "seconds in which a body must arrive; 408 beyond")
    max_connections: int = _field(1000, "open connections; 503 beyond")
    max_images: int = _field(1, "images of a request, of models that take several")
    max_image_bytes: int = _field(20 * _MEBIBYTE, "bytes of an encoded image; 413 beyond")
    max_image_pixels: int = _field(24_000_000, "pixels of an image; 422 beyond")
    image_timeout_s: float = _field(20.0, "seconds for decoding an image; 422 beyond")
    image_memory_bytes: int = _field(
        2048 * _MEBIBYTE, "address space of a process that decodes images; 422 beyond"
    )
    num_workers: int = _field(2, "processes that decode images")
    allow_media_domains: tuple[str, ...] = _field(
        (), "hosts that images may be fetched from; none by default"
    )
    allow_http: bool = _field(False, "fetch images over http too, not only https")
    connect_timeout_s: float = _field(5.0, "seconds for connecting to an image's host")
    fetch_timeout_s: float = _field(10.0, "seconds for fetching an image, connecting included")
    api_key_file: str | None = _field(
        None, "file of keys, one a line; asked for on every path but /health"
    )
    metrics_port: int | None = _field(
        None, "serve /metrics on this port instead, where it asks for no key"
    )
    grace_s: float = _field(30.0, "seconds that running requests have after SIGTERM")
    log_json: bool = _field(False, "log JSON lines")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            least_is_zero = field.name in ("port", "grace_s")
            if not math.isfinite(value) or value < 0 or (value == 0 and not least_is_zero):
                raise ValueError(f"--{field.name} is {quoted(value)}; expected a positive number")
        if not self.reductions:
            raise ValueError("--reductions is empty; expected for example 'prumerge+ full'")
        for spelling in self.reductions:
            try:
                reductions.require_before_decoder(reductions.parse(spelling), "serving")
            except ValueError as error:
                raise ValueError(f"--reductions: {error}") from None
        if len(set(self.reductions)) < len(self.reductions):
            raise ValueError("--reductions names one of them twice")
        if self.quantize is not None:
            try:
                format_named(self.quantize)
            except ValueError as error:
                raise ValueError(f"--{error}") from None
        for host in self.allow_media_domains:
            if host != host.lower() or set(host) & set(":/@ *"):
                raise ValueError(
                    f"--allow_media_domains: {quoted(host)} is not a host name; expected for "
                    "example images.example.org, in lower case and without wildcard or port"
                )


def parse_flags(arguments: Sequence[str]) -> ServeConfig:
    """The configuration that a command line describes.

    Raises:
      ValueError: a value is not allowed.
      SystemExit: after `--help`, or a flag is unknown or its value of another type.
    """
    parser = argparse.ArgumentParser(
        prog="prumerge-serve",
        description="Serves a LLaVA with adaptive visual tokens behind OpenAI's chat interface.",
        allow_abbrev=False,
    )
    hints = typing.get_type_hints(ServeConfig)
    for field in dataclasses.fields(ServeConfig):
        hint = hints[field.name]
        options: dict[str, Any] = {"default": field.default, "help": field.metadata["help"]}
        choices = [part for part in typing.get_args(hint) if part is not type(None)]
        if hint is bool:
            options["action"] = "store_true"
        elif typing.get_origin(hint) is tuple:
            options["nargs"] = "+"
        elif typing.get_origin(hint) is typing.Literal:
            options["choices"] = choices
        else:
            options["type"] = choices[0] if choices else hint
        if field.default is not None and hint is not bool:
            shown = " ".join(field.default) if isinstance(field.default, tuple) else field.default
            options["help"] += f" (default: {shown})".replace("%", "%%") if shown != "" else ""
        parser.add_argument(f"--{field.name}", **options)
    values: dict[str, Any] = vars(parser.parse_args(arguments))
    for name, value in values.items():
        values[name] = tuple(value) if isinstance(value, list) else value
    return ServeConfig(**values)
