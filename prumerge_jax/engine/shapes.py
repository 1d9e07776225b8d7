"""The shapes of the compiled programs, and how those that depend on the requests are chosen."""

import dataclasses

import numpy as np

from prumerge_jax.data import packing
from prumerge_jax.reductions import Reduction

MULTIPLE = 128
"""Lengths that are chosen are multiples of this; the TPU attention kernel wants it."""
SAMPLE = 1024
"""Requests whose packing is tried when a row length is chosen."""


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """The shapes of the compiled programs. None of them changes a result.

    Attributes:
      batch_size: images per encode step.
      window: queries that are planned together, a multiple of `batch_size`.
      row_length: tokens per packed row; no prompt, visual tokens included, can be longer. None
        lets `fit` choose it for the requests.
      rows: rows per prefill.
      slots: sequences decoded at once.
      cache_length: the longest sequence, generated tokens included, that can be decoded. None lets
        `fit` choose it.
      chunk: decode steps between two looks at the results.
    """

    batch_size: int = 8
    window: int = 64
    row_length: int | None = None
    rows: int = 4
    slots: int = 16
    cache_length: int | None = None
    chunk: int = 16

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ValueError(f"{field.name} is {value}; expected at least 1")
        if self.window % self.batch_size:
            raise ValueError(
                f"window {self.window} is not a multiple of batch_size {self.batch_size}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shapes(EngineConfig):
    """An `EngineConfig` that leaves no length open.

    Attributes:
      longest_prompt: the longest prompt, visual tokens included, that can run. Attention in long
        rows of short prompts costs as little as this is small.
    """

    row_length: int
    longest_prompt: int
    cache_length: int


def fit(
    config: EngineConfig,
    reduction: Reduction,
    num_patches: int,
    text_tokens: np.ndarray,
    *,
    max_new_tokens: int = 0,
    max_positions: int,
) -> Shapes:
    """The configuration with the lengths that it leaves open chosen for these requests.

    Only what is known before any image is seen decides, so the same requests always get the same
    shapes.

    Args:
      config: the shapes; lengths that it does set stay.
      reduction: what happens to the visual tokens.
      num_patches: N.
      text_tokens: int [requests], tokens of each request apart from the image's.
      max_new_tokens: most tokens to generate.
      max_positions: the longest sequence that the model can take.
    """
    if not len(text_tokens):  # shapes there must be all the same
        text_tokens = np.zeros(1, np.int64)
    # A capacity is no bound here: images that need more run again with all they can need.
    most = reduction.uncapped().capacity_for(num_patches)
    lengths = np.minimum(text_tokens + most, max_positions)
    row_length, cache_length = config.row_length, config.cache_length
    if row_length is None:
        choose = roomy_row_length if reduction.varying else tight_row_length
        row_length = choose(lengths)
    if cache_length is None:
        cache_length = _round_up(min(int(lengths.max()) + max_new_tokens, max_positions))
    return Shapes(
        **{
            **vars(config),
            "row_length": row_length,
            "longest_prompt": min(_round_up(int(lengths.max())), row_length),
            "cache_length": cache_length,
        }
    )


def roomy_row_length(longest: np.ndarray) -> int:
    """For counts that vary from image to image: room for six of the longest sequences, but no more
    than 1024 tokens unless one alone is longer.

    Among so many there are some that fill a row up, see `packing.fill_rows`. Longer rows gain
    little, and attention that does not leave out keys by `longest_prompt` computes the square of
    every row.

    Args:
      longest: int [requests], the most tokens that each can have.
    """
    most = int(longest.max())
    return _round_up(max(most, min(6 * most, 1024)))


def tight_row_length(lengths: np.ndarray) -> int:
    """For counts known beforehand: the row length up to two sequences that leaves least padding.

    Without reduction a sequence of LLaVA-1.5 has 576 tokens and a short text; rows of 640 hold one
    with next to no padding, rows of 1024 would be padding by 38 %.

    Args:
      lengths: int [requests], the tokens of each.
    """
    most = int(lengths.max())
    sample = np.sort(lengths)[::-1][:: -(-len(lengths) // SAMPLE)]
    computed = {
        row_length: row_length * len(packing.fill_rows(sample, row_length))
        for row_length in range(_round_up(most), _round_up(2 * most) + 1, MULTIPLE)
    }
    return min(computed, key=lambda row_length: (computed[row_length], row_length))


def _round_up(length: int) -> int:
    return -(-length // MULTIPLE) * MULTIPLE
