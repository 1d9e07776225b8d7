"""The batch engine: many (image, text) queries through few programs of fixed shape.

A window of queries goes through four stations:

1. encode: images, in batches of one shape, to visual tokens of per-image length.
2. plan: the lengths come to the host, which packs all sequences into rows (`data.packing`).
3. prefill: rows of one shape through the decoder.
4. read off log-likelihoods; or decode the sequences in slots (`slots.py`).

Work is dispatched ahead: while the host plans one window, the device already encodes the next, and
results are fetched only after the work that follows them has been queued.
"""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from prumerge_jax import prumerge
from prumerge_jax.data import packing
from prumerge_jax.distributed import sharding
from prumerge_jax.inference import programs
from prumerge_jax.models.config import LlavaConfig

HEAD_POSITIONS = 256
"""Positions that one call of the scoring head takes."""


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The shapes of the compiled programs. None of them changes a result.

    Attributes:
      batch_size: images per encode step.
      window: queries that are planned together, a multiple of `batch_size`.
      row_length: tokens per packed row; the longest prompt, visual tokens included, that can run.
      rows: rows per prefill.
      slots: sequences decoded at once.
      cache_length: the longest sequence, generated tokens included, that can be decoded.
      chunk: decode steps between two looks at the results.
    """

    batch_size: int = 8
    window: int = 64
    row_length: int = 1024
    rows: int = 4
    slots: int = 16
    cache_length: int = 1024
    chunk: int = 16

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(
                    f"{field.name} is {getattr(self, field.name)}; expected at least 1"
                )
        if self.window % self.batch_size:
            raise ValueError(
                f"window {self.window} is not a multiple of batch_size {self.batch_size}"
            )


class Query(NamedTuple):
    """One sequence to run.

    Attributes:
      key: names the query in its result.
      token_ids: int32 [T] with one `packing.IMAGE_TOKEN` where the image goes.
      pixels: uint8 [S, S, 3]; None for a query without image.
      image_key: queries of one window with the same key share one encoding; None shares nothing.
      continuation: int32 token ids to score after `token_ids`; empty when generating.
      max_new_tokens: most tokens to generate.
      seed: of this query's random draws.
    """

    key: int
    token_ids: np.ndarray
    pixels: np.ndarray | None
    image_key: str | None = None
    continuation: np.ndarray = np.zeros(0, np.int32)
    max_new_tokens: int = 0
    seed: int = 0

    @property
    def text_tokens(self) -> int:
        """Tokens of the prompt, the image's left out."""
        return int(np.count_nonzero(self.token_ids != packing.IMAGE_TOKEN))


class Result(NamedTuple):
    """What became of a query.

    Attributes:
      key: the query's.
      token_ids: generated tokens without the end-of-sequence token; empty when scoring.
      log_likelihood: of the continuation, natural logarithm, summed; nan when generating.
      visual_tokens: of the query's image, 0 without one.
      text_tokens: of the prompt.
      error: why the query was not run; None when it was.
    """

    key: int
    token_ids: list[int]
    log_likelihood: float
    visual_tokens: int
    text_tokens: int
    error: str | None = None


@dataclasses.dataclass
class Counters:
    """What an engine has computed, for speed and padding figures."""

    images: int = 0
    visual_tokens: int = 0
    real_tokens: int = 0
    row_tokens: int = 0


@dataclasses.dataclass
class Window:
    """Queries that are planned together, with their encoded images.

    Attributes:
      queries: those that can run.
      requests: the planner's view of them, in the same order.
      layout: lengths of the images in `pool`.
      pool: [window, R, Dv] visual tokens.
      failed: queries that cannot run, with the reason.
    """

    queries: list[Query]
    requests: list[packing.Request]
    layout: packing.VisualLayout
    pool: jax.Array
    failed: list[Result]

    def visual_tokens(self, index: int) -> int:
        """The number of visual tokens of query `index`."""
        return int(sum(self.layout.lengths[row] for row in self.requests[index].image_rows))


class Engine:
    """Runs queries on one model with one reduction."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        state: nnx.State,
        model_config: LlavaConfig,
        reduction: prumerge.PruMergeConfig,
        config: EngineConfig,
        *,
        dtype: jnp.dtype,
        position_ids: packing.PositionIds = "compact",
        implementation: str = "xla",
        mesh: Mesh | None = None,
    ) -> None:
        """Prepares an engine; nothing is compiled yet.

        Args:
          graphdef, state: a `LlavaModel`, its weights on `mesh` where there is one.
          model_config: its configuration.
          reduction: what happens to the visual tokens.
          config: the shapes.
          dtype: compute dtype.
          position_ids: see `packing.pack_window`.
          implementation: attention backend, see `attention.attend`.
          mesh: devices to split images, rows and slots over.

        Raises:
          ValueError: a shape does not divide over the data shards of the mesh.
        """
        self.graphdef, self.state = graphdef, state
        self.model_config, self.reduction, self.config = model_config, reduction, config
        self.dtype, self.implementation, self.mesh = jnp.dtype(dtype), implementation, mesh
        self.position_ids = position_ids
        self.shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self.counters = Counters()
        for name in ("batch_size", "rows", "slots"):
            if getattr(config, name) % self.shards:
                raise ValueError(
                    f"{name} {getattr(config, name)} does not divide over the "
                    f"{self.shards} data shards of the mesh"
                )

    def score(self, queries: Iterable[Query]) -> Iterator[Result]:
        """The log-likelihood of every query's continuation. Results come in any order."""
        unread: collections.deque[_Scores] = collections.deque()
        for window in self.windows(queries):
            yield from window.failed
            for rows in self.plan(window):
                hidden = programs.read(
                    self.graphdef,
                    self.state,
                    window.pool,
                    self.put_rows(rows),
                    implementation=self.implementation,
                )
                unread.append(_Scores(window, rows, self._log_likelihoods(hidden, rows)))
                if len(unread) > 1:
                    yield from unread.popleft().results()
        for scores in unread:
            yield from scores.results()

    def windows(self, queries: Iterable[Query]) -> Iterator[Window]:
        """Encoded windows, one ahead of the one handed out.

        Queries whose image needs more tokens than the capacity come last, encoded again at the
        largest capacity an image can need.
        """
        overflow: list[Query] = []
        yield from self._windows(queries, self.reduction, overflow)
        if overflow:
            yield from self._windows(
                overflow, dataclasses.replace(self.reduction, capacity=None), []
            )

    def plan(self, window: Window) -> list[packing.Rows]:
        """Packs a window's sequences into batches of rows."""
        batches = packing.pack_window(
            window.requests,
            window.layout,
            self.config.row_length,
            self.config.rows,
            shards=self.shards,
            position_ids=self.position_ids,
        )
        self.counters.real_tokens += sum(int((rows.segment_ids > 0).sum()) for rows in batches)
        self.counters.row_tokens += sum(rows.segment_ids.size for rows in batches)
        return batches

    def put(self, x: np.ndarray) -> jax.Array:
        """Host to device, split over the data shards where there is a mesh."""
        if self.mesh is None:
            return jnp.asarray(x)
        return jax.device_put(x, NamedSharding(self.mesh, sharding.spec("batch")))

    def put_rows(self, rows: packing.Rows) -> programs.Rows:
        """The device's part of a plan."""
        fields = (rows.ids, rows.visual_index, rows.positions, rows.segment_ids)
        return programs.Rows(*(self.put(field) for field in fields))

    def _windows(
        self,
        queries: Iterable[Query],
        reduction: prumerge.PruMergeConfig,
        overflow: list[Query],
    ) -> Iterator[Window]:
        ahead: _Encoding | None = None
        iterator = iter(queries)
        while batch := list(itertools.islice(iterator, self.config.window)):
            encoding = self._encode(batch, reduction)
            if ahead is not None:
                yield self._finish(ahead, overflow)
            ahead = encoding
        if ahead is not None:
            yield self._finish(ahead, overflow)

    def _encode(self, queries: list[Query], reduction: prumerge.PruMergeConfig) -> "_Encoding":
        """Dispatches the encoding of a window; waits for nothing."""
        images: list[np.ndarray] = []
        image_of: list[int | None] = []
        known: dict[str, int] = {}
        for query in queries:
            if query.pixels is None:
                image_of.append(None)
                continue
            number = len(images)
            if query.image_key is not None:
                number = known.setdefault(query.image_key, number)
            if number == len(images):
                images.append(query.pixels)
            image_of.append(number)

        size, side = self.config.batch_size, self.model_config.vision.image_size
        encoded = []
        for start in range(0, len(images), size):
            pixels = np.zeros((size, side, side, 3), np.uint8)
            pixels[: len(images) - start] = images[start : start + size]
            encoded.append(
                programs.encode(
                    self.graphdef,
                    self.state,
                    self.put(pixels),
                    reduction=reduction,
                    dtype=self.dtype,
                    implementation=self.implementation,
                )
            )
        return _Encoding(queries, image_of, len(images), encoded, reduction)

    def _finish(self, encoding: "_Encoding", overflow: list[Query]) -> Window:
        """Waits for the lengths and sorts out what cannot run."""
        size, batches = self.config.batch_size, self.config.window // self.config.batch_size
        patches = self.model_config.vision.num_patches
        capacity = encoding.reduction.capacity_for(patches)
        shape = (size, batches)
        lengths, required = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        patch_indices = np.full((*shape, capacity), -1, np.int32)
        for batch, tokens in enumerate(encoding.encoded):
            # The image that is row j of batch b is row j * batches + b of the pool: on a mesh it
            # then lies in the pool on the device that encoded it.
            lengths[:, batch], required[:, batch], patch_indices[:, batch] = jax.device_get(
                (tokens.lengths, tokens.required, tokens.patch_indices)
            )
        flat_lengths, flat_required = lengths.reshape(-1), required.reshape(-1)
        width = self.model_config.vision.width
        idle = jnp.zeros((size, capacity, width), self.dtype)
        pool = [tokens.tokens for tokens in encoding.encoded]
        pool += [idle] * (batches - len(pool))
        window = Window(
            queries=[],
            requests=[],
            layout=packing.VisualLayout(
                flat_lengths, patch_indices.reshape(size * batches, capacity), patches
            ),
            pool=programs.join(pool),
            failed=[],
        )
        for query, image in zip(encoding.queries, encoding.image_of, strict=True):
            image_row = None if image is None else image % size * batches + image // size
            if image_row is not None and flat_required[image_row] > capacity:
                overflow.append(query)
                continue
            count = 0 if image_row is None else int(flat_lengths[image_row])
            broken = image_row is not None and flat_required[image_row] < 0
            error = self._refusal(query, count, broken=broken)
            if error is not None:
                window.failed.append(
                    Result(query.key, [], float("nan"), count, query.text_tokens, error)
                )
                continue
            window.queries.append(query)
            window.requests.append(_request(query, image_row))
        self.counters.images += encoding.num_images
        self.counters.visual_tokens += int(lengths.sum())
        return window

    def _refusal(self, query: Query, visual_tokens: int, *, broken: bool) -> str | None:
        """Why a query cannot run; None if it can."""
        if broken:
            return "the image's CLS attention is not finite; check the image and the weights"
        length = query.text_tokens + visual_tokens + len(query.continuation)
        if length > self.config.row_length:
            return (
                f"the prompt has {length} tokens ({visual_tokens} of them visual); a row holds "
                f"{self.config.row_length}. Nothing is truncated: shorten it or raise row_length"
            )
        limit = min(self.config.cache_length, self.model_config.text.max_positions)
        if query.max_new_tokens and length + query.max_new_tokens > limit:
            return (
                f"the prompt has {length} tokens and {query.max_new_tokens} may follow; the limit "
                f"is {limit}. Lower max_new_tokens, or raise cache_length if the model allows"
            )
        return None

    def _log_likelihoods(self, hidden: jax.Array, rows: packing.Rows) -> list[jax.Array]:
        """log p of every target of the rows, in calls of `HEAD_POSITIONS` each."""
        flat = rows.targets.reshape(-1)
        positions = np.flatnonzero(flat != packing.IGNORE)
        parts = []
        for start in range(0, len(positions), HEAD_POSITIONS):
            index = np.zeros(HEAD_POSITIONS, np.int32)
            part = positions[start : start + HEAD_POSITIONS]
            index[: len(part)] = part
            targets = np.maximum(flat[index], 0)  # the filler's target may be no token
            parts.append(
                programs.log_likelihoods(
                    self.graphdef, self.state, hidden, jnp.asarray(index), jnp.asarray(targets)
                )
            )
        return parts


class _Encoding(NamedTuple):
    """A window whose encoding has been dispatched. `image_of` numbers each query's image."""

    queries: list[Query]
    image_of: list[int | None]
    num_images: int
    encoded: list[prumerge.VisualTokens]
    reduction: prumerge.PruMergeConfig


class _Scores(NamedTuple):
    """Log-likelihoods that have been dispatched and not been read."""

    window: Window
    rows: packing.Rows
    parts: list[jax.Array]

    def results(self) -> Iterator[Result]:
        """Sums them per query."""
        positions = np.flatnonzero(self.rows.targets.reshape(-1) != packing.IGNORE)
        values = np.concatenate([np.zeros(0), *jax.device_get(self.parts)])[: len(positions)]
        begin = self.rows.row_of * self.rows.targets.shape[1] + self.rows.start_of
        first = np.searchsorted(positions, begin)
        last = np.searchsorted(positions, begin + self.rows.length_of)
        sums = [values[a:b].sum(dtype=np.float64) for a, b in zip(first, last, strict=True)]
        for index, total in zip(self.rows.requests, sums, strict=True):
            query = self.window.queries[index]
            visual_tokens = self.window.visual_tokens(index)
            yield Result(query.key, [], float(total), visual_tokens, query.text_tokens)


def _request(query: Query, image_row: int | None) -> packing.Request:
    """The planner's view of a query: prompt and continuation, the latter to be predicted."""
    token_ids = np.concatenate([query.token_ids, query.continuation]).astype(np.int32)
    labels = np.full(token_ids.shape, packing.IGNORE, np.int32)
    labels[len(query.token_ids) :] = query.continuation
    return packing.Request(token_ids, () if image_row is None else (image_row,), labels)
