"""The shapes of the jitted functions, and how those that depend on the requests are chosen."""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from prumerge_jax.data import filling
from prumerge_jax.data.filling import Group
from prumerge_jax.data.layout import Layout
from prumerge_jax.data.prefixes import find_groups
from prumerge_jax.data.tokens import IMAGE_TOKEN
from prumerge_jax.engine.request import Opening
from prumerge_jax.models import tuning
from prumerge_jax.models.attention.paged_kernels import TABLE_MULTIPLE
from prumerge_jax.reductions import Reduction

MULTIPLE = 128
"""Lengths that are chosen are multiples of this; the TPU attention kernel wants it."""
SAMPLE = 1024
"""Requests whose packing is tried when a row length is chosen."""
SAMPLE_OF_GROUPS = 256
"""Those of them that are looked at for what they share."""


@dataclasses.dataclass(frozen=True)
class EngineSizes:
    """How much one call of each jitted function takes.

    Attributes:
      batch_size: crops per encode step.
      window_size: most requests, and most crops of their images, that are planned together; a
        multiple of `batch_size`.
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


def serving_sizes() -> EngineSizes:
    """For requests that come one by one: few wait for others, and decoding seldom waits for many
    images or long rows."""
    return EngineSizes(tuning.current().images_at_once, 8, 1, 16, 4)


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
      share_prefixes: whether requests that begin alike, as questions about one image do, have what
        they share computed once.
      short_rows: ascending lengths, to the first of which that holds what is in them rows are cut
        that are not full; those of `row_length` and more are left out. Each has programs of its
        own.
      pool_capacity: places for each crop's tokens where rows take them from; None takes the
        reduction's capacity. Engines of equal ones share their programs.
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
    share_prefixes: bool = True
    short_rows: tuple[int, ...] = ()
    pool_capacity: int | None = None
    defaults: EngineSizes = EngineSizes()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is not bool and isinstance(value, int) and value < 1:
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

    def with_batches_of(self, crops: int, shards: int) -> "EngineConfig":
        """A configuration whose batches hold so many crops of one image, unless a size is set."""
        sizes, needed = self.sizes(shards), crops * shards
        if self.batch_size or self.window_size or sizes.batch_size >= needed:
            return self
        window_size = _next_multiple(sizes.window_size, needed)
        defaults = dataclasses.replace(self.defaults, batch_size=needed, window_size=window_size)
        return dataclasses.replace(self, defaults=defaults)


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
      share_prefixes: see `EngineConfig`. Rows with shared prefixes and rows without are two forms
        of the functions that take rows.
      short_rows, pool_capacity: see `EngineConfig`.

    Raises:
      ValueError: the window is not a multiple of the batch size.
    """

    row_length: int
    longest_prompt: int
    cache_length: int
    page_size: int = 16
    pages: int | None = None
    share_prefixes: bool = True
    short_rows: tuple[int, ...] = ()
    pool_capacity: int | None = None

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Lengths of rows, the whole length last."""
        return (*(each for each in self.short_rows if each < self.row_length), self.row_length)

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

    def limited_to(self, requests: int, crops: int, kinds: int = 1) -> "EngineShapes":
        """Shapes no larger than so few requests, of so many crops together, can fill.

        Crops of different `kinds` are encoded in separate batches.
        """
        enough = 1 << max(requests - 1, 0).bit_length()
        if enough >= self.batch_size:
            return self
        pixels = 1 << max(requests - 1, crops - 1, 0).bit_length()
        return dataclasses.replace(
            self,
            batch_size=min(self.batch_size, pixels),
            window_size=pixels * kinds if pixels < self.batch_size else self.window_size,
            prefill_rows=min(self.prefill_rows, enough),
            slots=min(self.slots, enough),
            pages=min(self.pool_pages, enough * self.pages_per_sequence),
        )


def most_visual_tokens(reduction: Reduction, layout: Layout) -> int:
    """The most visual tokens, newlines included, that an image of this layout can have.

    A capacity does not bound them: images that need more run again with all they can need.
    """
    patches = layout.pooled**2 if layout.frames else layout.num_patches
    if not reduction.reduces(patches):
        return layout.span
    capacity = reduction.uncapped().capacity_for(patches)
    if layout.frames:
        return layout.frames * (capacity + (layout.cls and reduction.frame_cls)) + layout.newline
    rows, _ = layout.shape  # of newlines, where these are asked for
    return layout.num_crops * capacity + layout.newline * max(rows, 1)


def fit(
    config: EngineConfig,
    reduction: Reduction,
    num_patches: int,
    openings: Sequence[Opening],
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
      num_patches: N, of images whose layout no opening has: they are one crop.
      openings: the requests, in the order in which they come.
      max_new_tokens: most tokens to generate.
      max_positions: the longest sequence that the model can take.
      shards: data shards of the mesh.
      pages_that_fit: pages that the devices' memory holds, None if unknown.

    Raises:
      ValueError: a size that was set does not divide over the shards.
    """
    if reduction.merges_frames:
        frames = (each.frames for opening in openings for each in opening.layouts)
        config = config.with_batches_of(max(frames, default=0), shards)
    text_tokens = np.array([opening.text_tokens for opening in openings] or [0])
    # A capacity does not bound them: images that need more run again with all they can need.
    most = reduction.uncapped().capacity_for(num_patches)
    known = [[most_visual_tokens(reduction, each) for each in o.layouts] for o in openings]
    visual = [sum(counts) if counts else most for counts in known] or [most]
    lengths = np.minimum(text_tokens + np.array(visual), max_positions)
    row_length, cache_length = config.row_length, config.cache_length
    sizes = config.sizes(shards)
    shared = None
    share_prefixes = config.share_prefixes and not reduction.drops_tokens
    if share_prefixes:
        limit = max_positions if row_length is None else min(row_length, max_positions)
        sample = openings[:SAMPLE_OF_GROUPS]
        counts = [
            each or [most] * len(opening.images)
            for each, opening in zip(known, sample, strict=False)
        ]
        shared = _shared(sample, counts, limit)
    if row_length is None:
        if shared is not None:
            row_length = row_length_for_groups(shared, int(lengths.max()), reduction.varying)
        elif reduction.varying:
            row_length = row_length_for_variable_counts(lengths)
        else:
            row_length = row_length_for_fixed_counts(lengths)
    if cache_length is None:
        cache_length = _next_multiple(
            min(int(lengths.max()) + max_new_tokens, max_positions), MULTIPLE
        )
    if shared is not None and len(openings) <= SAMPLE_OF_GROUPS:
        rows = _next_multiple(shared.rows(row_length), shards)
        sizes = dataclasses.replace(sizes, prefill_rows=min(sizes.prefill_rows, rows))
    shapes = EngineShapes(
        **vars(sizes),
        row_length=row_length,
        longest_prompt=min(_next_multiple(int(lengths.max()), MULTIPLE), row_length),
        cache_length=cache_length,
        page_size=config.page_size or tuning.current().page_size,
        pages=config.pages,
        share_prefixes=share_prefixes,
        short_rows=config.short_rows,
        pool_capacity=config.pool_capacity,
    )
    if config.pages is not None:
        return shapes
    usual = cache_length - max(visual) // 2 if reduction.varying else cache_length
    pages = shapes.slots * -(-usual // shapes.page_size)
    if pages_that_fit is not None:
        pages = min(pages, pages_that_fit // shards * shards)
    least = shards * shapes.pages_per_sequence
    return dataclasses.replace(shapes, pages=max(_next_multiple(pages, shards), least))


class _Shared(NamedTuple):
    """Requests in groups that share prefixes, each with the most tokens that it can have."""

    groups: list[Group]
    lengths: np.ndarray

    @property
    def tokens(self) -> int:
        """Tokens of all groups."""
        return sum(group.size(self.lengths) for group in self.groups)

    def rows(self, row_length: int) -> int:
        """Number of rows of this length that they fill."""
        return len(filling.fill_rows_with_groups(self.groups, self.lengths, row_length))


def _shared(
    openings: Sequence[Opening], counts: Sequence[Sequence[int]], limit: int
) -> _Shared | None:
    """What requests share whose images have so many tokens, those of more than `limit` tokens left
    out; None where that is nothing or little."""
    tokens = []
    numbers: dict[Hashable, int] = {}
    most = max((count for each in counts for count in each), default=0)
    for opening, of_images in zip(openings, counts, strict=True):
        ids = opening.token_ids.astype(np.int64)
        is_image = ids == IMAGE_TOKEN
        named = [numbers.setdefault(name, len(numbers)) for name in opening.images]
        width = np.ones(len(ids), np.int64)
        width[is_image] = of_images
        expanded = np.repeat(ids, width)
        # Negative numbers are visual tokens.
        visual = (
            -1 - most * number - np.arange(count)
            for number, count in zip(named, of_images, strict=True)
        )
        expanded[np.repeat(is_image, width)] = np.concatenate([np.zeros(0, np.int64), *visual])
        if len(expanded) <= limit:
            tokens.append(expanded)
    groups = find_groups(tokens, [max(len(each) - 1, 0) for each in tokens])
    if all(len(group.members) == 1 for group in groups):
        return None
    return _Shared(groups, np.array([len(each) for each in tokens]))


def row_length_for_groups(shared: _Shared, longest: int, varying: bool) -> int:
    """Up to 2048 tokens, unless a request has more: every row computes its groups' prefixes again.

    Args:
      shared: requests, with the most tokens that they can have.
      longest: the most tokens of any request.
      varying: whether they may have fewer. Of lengths that are known, the shortest row is taken
        that is within 3 % of the least padding.
    """
    first = _next_multiple(longest, MULTIPLE)
    last = max(first, min(_next_multiple(shared.tokens, MULTIPLE), 2048))
    if varying:
        return last
    computed = {length: length * shared.rows(length) for length in range(first, last + 1, MULTIPLE)}
    least = min(computed.values())
    return min(length for length, tokens in computed.items() if tokens <= 1.03 * least)


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
