"""The batch engine: many (image, text) queries through few programs of fixed shape.

A window of queries goes through four stations:

1. encode: images, in batches of one shape, to visual tokens of per-image length.
2. plan: the lengths come to the host, which packs all sequences into rows (`data.packing`).
3. prefill: rows of one shape through the decoder.
4. read off log-likelihoods (`scoring.py`); or decode the sequences in slots (`slots.py`).

Work is dispatched ahead: while the host plans one window, the device already encodes the next, and
results are fetched only after the work that follows them has been queued.

A window's sequences seldom fill its last batch of rows. Those of the last batch therefore wait for
the next window, where they come first and others fill up their rows.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from prumerge_jax import sharding
from prumerge_jax.data import packing
from prumerge_jax.data.tokens import IGNORE, IMAGE_TOKEN
from prumerge_jax.engine import programs
from prumerge_jax.engine.shapes import Shapes
from prumerge_jax.models.config import LlavaConfig
from prumerge_jax.prumerge import VisualTokens
from prumerge_jax.reductions import Reduction


class Query(NamedTuple):
    """One sequence to run.

    Attributes:
      key: names the query in its result.
      token_ids: int32 [T] with one `IMAGE_TOKEN` where the image goes.
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
        return int(np.count_nonzero(self.token_ids != IMAGE_TOKEN))


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
      queries: those that can run; first the ones held back from the window before.
      requests: the planner's view of them, in the same order.
      layout: lengths of the images in `pool`.
      pool: [2 * window, R, Dv] visual tokens of the window before and of this one.
      batches: rows to run; queries that stand in none of them are held back.
      failed: queries that cannot run, with the reason.
    """

    queries: list[Query]
    requests: list[packing.Request]
    layout: packing.VisualLayout
    pool: jax.Array
    batches: list[packing.Rows]
    failed: list[Result]

    def visual_tokens(self, index: int) -> int:
        """The number of visual tokens of query `index`."""
        return int(sum(self.layout.lengths[row] for row in self.requests[index].image_rows))


class Encoding(NamedTuple):
    """A window whose encoding has been dispatched.

    Attributes:
      queries: the window's.
      image_of: the number of each query's image in the window.
      num_images: how many images that makes.
      encoded: visual tokens, `batch_size` images in each.
      reduction: what they were encoded with.
    """

    queries: list[Query]
    image_of: list[int | None]
    num_images: int
    encoded: list[VisualTokens]
    reduction: Reduction


class Images(NamedTuple):
    """A window's encoded images in `window / batch_size` batches of B = `batch_size`.

    Image i is row i % B of batch i // B; zeros where there is no image.

    Attributes:
      tokens: [B, R, Dv] for each batch, on the device.
      lengths: int32 [B, batches], on the host as all that follow.
      required: int32 [B, batches]; see `prumerge.VisualTokens`.
      patch_indices: int32 [B, batches, R].
    """

    tokens: list[jax.Array]
    lengths: np.ndarray
    required: np.ndarray
    patch_indices: np.ndarray


class _Held(NamedTuple):
    """Queries that wait for the next window, with their images' numbers in this one."""

    queries: list[Query]
    image_of: list[int | None]
    images: Images


class Engine:
    """Runs queries on one model with one reduction."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        state: nnx.State,
        model_config: LlavaConfig,
        reduction: Reduction,
        config: Shapes,
        *,
        dtype: jnp.dtype,
        position_ids: packing.PositionIds = "compact",
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
          mesh: devices to split images, rows and slots over.

        Raises:
          ValueError: a shape does not divide over the data shards of the mesh.
        """
        self.graphdef, self.state = graphdef, state
        self.model_config, self.reduction, self.config = model_config, reduction, config
        self.dtype, self.mesh = jnp.dtype(dtype), mesh
        self.position_ids = position_ids
        self.shards = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
        self.counters = Counters()
        for name in ("batch_size", "rows", "slots"):
            if getattr(config, name) % self.shards:
                raise ValueError(
                    f"{name} {getattr(config, name)} does not divide over the "
                    f"{self.shards} data shards of the mesh"
                )

    def windows(self, queries: Iterable[Query]) -> Iterator[Window]:
        """Encoded windows, one ahead of the one handed out.

        Queries whose image needs more tokens than the capacity come last, encoded again at the
        largest capacity an image can need.
        """
        overflow: list[Query] = []
        yield from self._windows(queries, self.reduction, overflow)
        if overflow:
            yield from self._windows(overflow, self.reduction.uncapped(), [])

    def put(self, x: np.ndarray) -> jax.Array:
        """Host to device, split over the data shards where there is a mesh."""
        if self.mesh is None:
            return jnp.asarray(x)
        return jax.device_put(x, NamedSharding(self.mesh, sharding.logical_spec("batch")))

    def put_rows(self, rows: packing.Rows) -> programs.Rows:
        """The device's part of a plan."""
        fields = (rows.ids, rows.visual_index, rows.positions, rows.segment_ids)
        return programs.Rows(*(self.put(field) for field in fields))

    def _windows(
        self,
        queries: Iterable[Query],
        reduction: Reduction,
        overflow: list[Query],
    ) -> Iterator[Window]:
        held = _Held([], [], self.measure(self._encode([], reduction)))
        for encoding, is_last in _one_ahead(self._encodings(queries, reduction)):
            window, held = self._plan(encoding, held, overflow, is_last=is_last)
            yield window

    def _encodings(self, queries: Iterable[Query], reduction: Reduction) -> Iterator[Encoding]:
        iterator = iter(queries)
        while batch := list(itertools.islice(iterator, self.config.window)):
            yield self._encode(batch, reduction)

    def _encode(self, queries: list[Query], reduction: Reduction) -> Encoding:
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
                )
            )
        return Encoding(queries, image_of, len(images), encoded, reduction)

    def measure(self, encoding: Encoding) -> Images:
        """Waits for a window's images and fetches what the host must know of them."""
        size, batches = self.config.batch_size, self.config.window // self.config.batch_size
        vision = self.model_config.vision
        capacity = encoding.reduction.capacity_for(vision.num_patches)
        lengths, required = np.zeros((2, size, batches), np.int32)
        patch_indices = np.full((size, batches, capacity), -1, np.int32)
        for batch, visual in enumerate(encoding.encoded):
            lengths[:, batch], required[:, batch], patch_indices[:, batch] = jax.device_get(
                (visual.lengths, visual.required, visual.patch_indices)
            )
        tokens = [visual.tokens for visual in encoding.encoded]
        if len(tokens) < batches:
            idle = self.put(np.zeros((size, capacity, vision.width), self.dtype))
            tokens += [idle] * (batches - len(tokens))
        return Images(tokens, lengths, required, patch_indices)

    def _plan(
        self, encoding: Encoding, held: _Held, overflow: list[Query], *, is_last: bool
    ) -> tuple[Window, _Held]:
        """Sorts out what cannot run and packs the rest, the queries held back before first."""
        before, images = held.images, self.measure(encoding)
        size, batches, capacity = images.patch_indices.shape

        def pool_row(image: int | None, batch: int) -> int | None:
            """Where the pool has image `image` of a window whose batches start at `batch`. On a
            mesh this is on the device that encoded it; see `programs.join`."""
            if image is None:
                return None
            return image % size * 2 * batches + batch + image // size

        queries, image_of = list(held.queries), list(held.image_of)
        requests = [
            _request(query, pool_row(image, 0))
            for query, image in zip(queries, image_of, strict=True)
        ]
        failed = []
        for query, image in zip(encoding.queries, encoding.image_of, strict=True):
            at = None if image is None else (image % size, image // size)
            required = 0 if at is None else int(images.required[at])
            if required > capacity:
                overflow.append(query)
                continue
            count = 0 if at is None else int(images.lengths[at])
            error = self._refusal(query, count, broken=required < 0)
            if error is not None:
                failed.append(Result(query.key, [], float("nan"), count, query.text_tokens, error))
                continue
            queries.append(query)
            image_of.append(image)
            requests.append(_request(query, pool_row(image, batches)))
        layout = packing.VisualLayout(
            np.concatenate([before.lengths, images.lengths], axis=1).reshape(-1),
            np.concatenate([before.patch_indices, images.patch_indices], axis=1).reshape(
                -1, capacity
            ),
            self.model_config.vision.num_patches,
        )
        urgent = len(held.queries)
        ready = packing.pack_window(
            requests,
            layout,
            self.config.row_length,
            self.config.rows,
            shards=self.shards,
            position_ids=self.position_ids,
            urgent=urgent,
        )
        waiting: list[int] = []
        # No query waits twice: its image is in the pool for two windows only.
        if ready and not is_last and ready[-1].requests[0] >= urgent:
            waiting = ready.pop().requests.tolist()
        self.counters.images += encoding.num_images
        self.counters.visual_tokens += int(images.lengths.sum())
        self.counters.real_tokens += sum(int((rows.segment_ids > 0).sum()) for rows in ready)
        self.counters.row_tokens += sum(rows.segment_ids.size for rows in ready)
        pool = programs.join(before.tokens + images.tokens)
        window = Window(queries, requests, layout, pool, ready, failed)
        return window, _Held([queries[i] for i in waiting], [image_of[i] for i in waiting], images)

    def _refusal(self, query: Query, visual_tokens: int, *, broken: bool) -> str | None:
        """Why a query cannot run; None if it can."""
        if broken:
            return "the image's CLS attention is not finite; check the image and the weights"
        length = query.text_tokens + visual_tokens + len(query.continuation)
        max_positions = self.model_config.text.max_positions
        if length > min(self.config.longest_prompt, max_positions):
            return (
                f"the prompt has {length} tokens ({visual_tokens} of them visual); the engine "
                f"takes {self.config.longest_prompt}, the model {max_positions}. Nothing is "
                "truncated: shorten it, or raise row_length if the model allows"
            )
        limit = min(self.config.cache_length, max_positions)
        if query.max_new_tokens and length + query.max_new_tokens > limit:
            return (
                f"the prompt has {length} tokens and {query.max_new_tokens} may follow; the limit "
                f"is {limit}. Lower max_new_tokens, or raise cache_length if the model allows"
            )
        return None


def _one_ahead(encodings: Iterator[Encoding]) -> Iterator[tuple[Encoding, bool]]:
    """Each encoding and whether it is the last; the next one is dispatched before."""
    current = next(encodings, None)
    while current is not None:
        following = next(encodings, None)
        yield current, following is None
        current = following


def _request(query: Query, image_row: int | None) -> packing.Request:
    """The planner's view of a query: prompt and continuation, the latter to be predicted."""
    token_ids = np.concatenate([query.token_ids, query.continuation]).astype(np.int32)
    labels = np.full(token_ids.shape, IGNORE, np.int32)
    labels[len(query.token_ids) :] = query.continuation
    return packing.Request(token_ids, () if image_row is None else (image_row,), labels)
