"""The shapes of the jitted functions, and how those that depend on the requests are chosen."""

import dataclasses

import numpy as np

from prumerge_jax.data import filling
from prumerge_jax.models import tuning
from prumerge_jax.models.attention.paged_kernels import TABLE_MULTIPLE
from prumerge_jax.reductions import Reduction

MULTIPLE = 128
"""Lengths that are chosen are multiples of this; the TPU attention kernel wants it."""
SAMPLE = 1024
"""Requests whose packing is tried when a row length is chosen."""


@dataclasses.dataclass(frozen=True)
class EngineSizes:
    """How much one call of each jitted function takes.

    Attributes:
      batch_size: images per encode step.
      window_size: requests that are planned together, a multiple of `batch_size`.
      prefill_rows: packed rows per prefill.
      slots: sequences decoded at once.
      decode_steps_per_call: decode steps between two readings of the results.
    """

    batch_size: int = 8
    window_size: int = 64
    prefill_rows: int = 4
    slots: int = 16
    decode_steps_per_call: int = 16


EVALUATION_SIZES = EngineSizes(32, 256, 2, 64, 8)
"""For thousands of requests, whose short answers free their slots soon."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Shapes of the jitted functions that a user may fix. None of them changes a result.

    Attributes:
      batch_size, window_size, prefill_rows, slots, decode_steps_per_call: see `EngineSizes`; None
        takes that of `defaults`, raised to a multiple of the mesh's data shards.
      row_length: tokens per packed row; no prompt, visual tokens included, can be longer. None
        lets `fit` choose it for the requests.
      cache_length: the longest sequence, generated tokens included, that can be decoded. None lets
        `fit` choose it.
      page_size: tokens per page of keys and values; None takes the platform's
        (`models.tuning.Tuning.page_size`).
      pages: pages in the pool, over all data shards. None lets `fit` choose: as many as the slots
        need if all sequences are of the longest kind, half of it where a reduction's token counts
        vary, and no more than the devices' memory holds. Too few pages cost waiting, nothing else.
      defaults: the sizes where the fields above are None.

    Raises:
      ValueError: a value is not an integer of at least 1.
    """

    batch_size: int | None = None
    window_size: int | None = None
    row_length: int | None = None
    prefill_rows: int | None = None
    slots: int | None = None
    cache_length: int | None = None
    page_size: int | None = None
    pages: int | None = None
    decode_steps_per_call: int | None = None
    defaults: EngineSizes = EngineSizes()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int) and value < 1:
                raise ValueError(
                    f"{field.name} is {value}; expected at least 1 (--config.engine.{field.name})"
                )
        if self.batch_size and self.window_size and self.window_size % self.batch_size:
            raise ValueError(
                f"window_size {self.window_size} is not a multiple of batch_size "
                f"{self.batch_size}; set --config.engine.window_size to one"
            )

    def sizes(self, shards: int = 1) -> EngineSizes:
        """The sizes on a mesh with this number of data shards.

        Raises:
          ValueError: a size that was set does not divide over the shards; the message names it.
        """
        for name in ("batch_size", "window_size", "prefill_rows", "slots", "pages"):
            value = getattr(self, name)
            if value is not None and value % shards:
                raise ValueError(
                    f"{name} {value} does not divide over the {shards} data shards of the mesh; "
                    f"set --config.engine.{name} to a multiple of {shards}"
                )
        defaults = self.defaults
        batch_size = self.batch_size or _next_multiple(defaults.batch_size, shards)
        if self.window_size is None:
            window_size = _next_multiple(defaults.window_size, batch_size)
        else:
            window_size = self.window_size
            while window_size % batch_size:  # only where nobody set the batch size
                batch_size -= shards
        return EngineSizes(
            batch_size,
            window_size,
            self.prefill_rows or _next_multiple(defaults.prefill_rows, shards),
            self.slots or _next_multiple(defaults.slots, shards),
            self.decode_steps_per_call or defaults.decode_steps_per_call,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineShapes(EngineSizes):
    """All shapes of the jitted functions.

    Attributes:
      row_length: tokens per packed row.
      longest_prompt: the longest prompt, visual tokens included, that can run. Attention in long
        rows of short prompts costs as little as this is small.
      cache_length: the longest sequence, generated tokens included, that can be decoded.
      page_size: tokens per page of keys and values.
      pages: pages in the pool, over all data shards; by default what all slots need at the longest.

    Raises:
      ValueError: the window is not a multiple of the batch size.
    """

    row_length: int
    longest_prompt: int
    cache_length: int
    page_size: int = 16
    pages: int | None = None

    @property
    def pages_per_sequence(self) -> int:
        """Pages of the longest sequence."""
        return -(-self.cache_length // self.page_size)

    @property
    def table_width(self) -> int:
        """Width of the page table: `pages_per_sequence` and what the kernels want."""
        return _next_multiple(self.pages_per_sequence, TABLE_MULTIPLE)

    @property
    def pool_pages(self) -> int:
        """Pages in the pool, over all data shards."""
        return self.slots * self.pages_per_sequence if self.pages is None else self.pages

    def __post_init__(self) -> None:
        if self.window_size % self.batch_size:
            raise ValueError(
                f"window_size {self.window_size} is not a multiple of batch_size {self.batch_size}"
            )

    def check_shards(self, shards: int) -> None:
        """Raises ValueError if images, rows, slots or pages do not divide over the data shards, or
        the pages of a shard do not hold the longest sequence."""
        for name in ("batch_size", "prefill_rows", "slots", "pool_pages"):
            if getattr(self, name) % shards:
                raise ValueError(
                    f"{name} {getattr(self, name)} does not divide over the {shards} data shards "
                    "of the mesh"
                )
        if self.pool_pages // shards < self.pages_per_sequence:
            raise ValueError(
                f"{self.pool_pages // shards} pages of {self.page_size} tokens do not hold the "
                f"longest sequence, {self.cache_length} tokens; set --config.engine.pages to at "
                f"least {shards * self.pages_per_sequence}, or cache_length to less"
            )

    def limited_to(self, requests: int) -> "EngineShapes":
        """Shapes no larger than so few requests can fill."""
        enough = 1 << max(requests - 1, 0).bit_length()
        if enough >= self.batch_size:
            return self
        return dataclasses.replace(
            self,
            batch_size=enough,
            window_size=enough,
            prefill_rows=min(self.prefill_rows, enough),
            slots=min(self.slots, enough),
            pages=min(self.pool_pages, enough * self.pages_per_sequence),
        )


def fit(
    config: EngineConfig,
    reduction: Reduction,
    num_patches: int,
    text_tokens: np.ndarray,
    *,
    max_new_tokens: int = 0,
    max_positions: int,
    shards: int = 1,
    pages_that_fit: int | None = None,
) -> EngineShapes:
    """The configuration with everything that it leaves open chosen for these requests.

    Only what is known before any image is seen decides, so the same requests always get the same
    shapes.

    Args:
      config: what is fixed.
      reduction: what happens to the visual tokens.
      num_patches: N.
      text_tokens: int [requests], tokens of each request apart from the image's.
      max_new_tokens: most tokens to generate.
      max_positions: the longest sequence that the model can take.
      shards: data shards of the mesh.
      pages_that_fit: pages that the devices' memory holds, None if unknown.

    Raises:
      ValueError: a size that was set does not divide over the shards.
    """
    if not len(text_tokens):  # shapes there must be all the same
        text_tokens = np.zeros(1, np.int64)
    # A capacity does not bound them: images that need more run again with all they can need.
    most = reduction.uncapped().capacity_for(num_patches)
    lengths = np.minimum(text_tokens + most, max_positions)
    row_length, cache_length = config.row_length, config.cache_length
    if row_length is None:
        if reduction.varying:
            row_length = row_length_for_variable_counts(lengths)
        else:
            row_length = row_length_for_fixed_counts(lengths)
    if cache_length is None:
        cache_length = _next_multiple(
            min(int(lengths.max()) + max_new_tokens, max_positions), MULTIPLE
        )
    shapes = EngineShapes(
        **vars(config.sizes(shards)),
        row_length=row_length,
        longest_prompt=min(_next_multiple(int(lengths.max()), MULTIPLE), row_length),
        cache_length=cache_length,
        page_size=config.page_size or tuning.current().page_size,
        pages=config.pages,
    )
    if config.pages is not None:
        return shapes
    pages = shapes.pool_pages // 2 if reduction.varying else shapes.pool_pages
    if pages_that_fit is not None:
        pages = min(pages, pages_that_fit // shards * shards)
    least = shards * shapes.pages_per_sequence
    return dataclasses.replace(shapes, pages=max(_next_multiple(pages, shards), least))


def row_length_for_variable_counts(longest: np.ndarray) -> int:
    """Room for six of the longest sequences, but no more than 1024 tokens unless one is longer.

    Among that many, some fill a row completely, see `filling.fill_rows`. Longer rows gain
    little, and attention that does not leave out keys by `longest_prompt` computes the square of
    every row.

    Args:
      longest: int [requests], the most tokens that each can have.
    """
    most = int(longest.max())
    return _next_multiple(max(most, min(6 * most, 1024)), MULTIPLE)


def row_length_for_fixed_counts(lengths: np.ndarray) -> int:
    """The row length, up to that of two sequences, that leaves least padding.

    Without reduction a sequence of LLaVA-1.5 has 576 tokens and a short text; rows of 640 hold one
    with next to no padding, rows of 1024 would be 38 % padding.

    Args:
      lengths: int [requests], the tokens of each.
    """
    most = int(lengths.max())
    sample = np.sort(lengths)[::-1][:: -(-len(lengths) // SAMPLE)]
    computed = {
        row_length: row_length * len(filling.fill_rows(sample, row_length))
        for row_length in range(
            _next_multiple(most, MULTIPLE), _next_multiple(2 * most, MULTIPLE) + 1, MULTIPLE
        )
    }
    return min(computed, key=lambda row_length: (computed[row_length], row_length))


def _next_multiple(value: int, of: int) -> int:
    return -(-value // of) * of
