"""Where the keys and values of packed prompts go in pages, those that prompts share once.

Full pages of a prefix have all its branches as readers. What it leaves over of a page is in the
page of the branch that came first, and copied for the others, which go on from there.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from prumerge_jax.data import packing
from prumerge_jax.engine.pages import PagePool


class PromptPages:
    """Pages of the prompts of one batch of rows.

    Attributes:
      places: int32 [rows, L], where each token of the rows goes (`attention.write_to_pages`).
    """

    def __init__(self, rows: packing.Rows, pools: Sequence[PagePool], page_size: int) -> None:
        self.places = np.full(rows.ids.shape, -1, np.int32)
        self._rows, self._pools, self._size = rows, pools, page_size
        self._first: dict[tuple[int, int], list[int]] = {}
        self._copies: list[list[tuple[int, int]]] = [[] for _ in pools]
        self._shares = False

    def take(self, place: int, shard: int) -> list[int]:
        """Pages for number `place` of the rows' requests, in order; its tokens go there.

        Raises:
          ValueError: the shard's pool has too few.
        """
        rows, size, pool = self._rows, self._size, self._pools[shard]
        row, start = rows.row_of[place], rows.start_of[place]
        before, own = int(rows.prefix_length_of[place]), int(rows.length_of[place])
        count, full = -(-(before + own) // size), before // size
        first = self._first.get(rows.prefix_of(place))
        if first is None:
            pages = pool.take(count)
            self._first[rows.prefix_of(place)] = pages
            begin = rows.prefix_start_of[place]
            self.places[row, begin : begin + before] = self._of(pages, 0, before)
        else:
            pool.share(first[:full])
            pages = first[:full] + pool.take(count - full)
            left = (self._of(each, full * size, before) for each in (first, pages))
            self._copies[shard] += zip(*(part.tolist() for part in left), strict=True)
            self._shares = True
        self.places[row, start : start + own] = self._of(pages, before, before + own)
        return pages

    def copies(self, most: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Places to copy from and to, once the prompts are in pages, each int32 [shards, most].

        There is a pair whenever anything is shared, of fillers if no token is left over: what runs
        once in a warm-up runs always.
        """
        longest = max(len(copies) for copies in self._copies)
        for begin in range(0, max(longest, 1) if self._shares else 0, most):
            pair = np.full((2, len(self._copies), most), -1, np.int32)
            pair[0] = 0
            for shard, copies in enumerate(self._copies):
                part = copies[begin : begin + most]
                if part:
                    pair[:, shard, : len(part)] = np.array(part).T
            yield pair[0], pair[1]

    def _of(self, pages: Sequence[int], begin: int, end: int) -> np.ndarray:
        """Places of a sequence's tokens `begin` to `end` in its pages."""
        at = np.arange(begin, end)
        return np.array(pages)[at // self._size] * self._size + at % self._size
