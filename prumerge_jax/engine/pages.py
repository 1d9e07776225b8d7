"""Which pages of keys and values are whose: the host's side of `models.attention.pages`.

Pages are given out as sequences grow, so a pool may be promised to more sequences than it can hold
at their longest. That nobody waits for ever is Dijkstra's banker's algorithm: a page is given only
if afterwards all sequences can still finish one after the other (`can_finish`).
"""

import collections
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from prumerge_jax.engine.encoding import PlacedModel
from prumerge_jax.models.config import TextConfig

SHARE_OF_FREE_MEMORY = 0.8
"""Of a device's free memory that pages may take; the rest is for what programs need to run."""


class Claim(NamedTuple):
    """Pages that a sequence gives back when it ends, and those it may still ask for."""

    held: int
    needed: int


def can_finish(free: int, running: Iterable[Claim], waiting: Iterable[Claim] = ()) -> bool:
    """Whether all sequences can finish one after the other with so many free pages.

    The running ones in the best order, which is that of their needs; then those that wait for a
    slot, in their order.
    """
    for claim in [*sorted(running, key=lambda claim: claim.needed), *waiting]:
        if claim.needed > free:
            return False
        free += claim.held
    return True


class PagePool:
    """The pages of one data shard, each with the number of sequences that read it.

    Attributes:
      size: number of pages.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._free = list(range(size))[::-1]
        self._readers: collections.Counter[int] = collections.Counter()

    @property
    def free(self) -> int:
        """Number of free pages."""
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Free pages, from now on with one reader each.

        Raises:
          ValueError: there are not as many.
        """
        if count > self.free:
            raise ValueError(f"{count} pages are wanted; {self.free} of {self.size} are free")
        taken = [self._free.pop() for _ in range(count)]
        self._readers.update(taken)
        return taken

    def share(self, pages: Sequence[int]) -> None:
        """Gives every one of these pages, which must be taken, one reader more."""
        self._check_taken(pages)
        self._readers.update(pages)

    def release(self, pages: Sequence[int]) -> None:
        """Takes a reader from every one of these pages; without any left it is free again."""
        self._check_taken(pages)
        for page in pages:
            self._readers[page] -= 1
            if not self._readers[page]:
                del self._readers[page]
                self._free.append(page)

    def only_reader(self, pages: Sequence[int]) -> int:
        """How many of these pages would be free if one reader of them left."""
        return sum(self._readers[page] == 1 for page in pages)

    def _check_taken(self, pages: Sequence[int]) -> None:
        for page in pages:
            if page not in self._readers:
                raise ValueError(f"page {page} is free; expected one that was taken")


def token_and_head_bytes(head_dim: int, dtype: jnp.dtype) -> int:
    """Bytes of the key, or the value, of one token and head; int8 has a float32 scale."""
    return head_dim * jnp.dtype(dtype).itemsize + (4 if dtype == jnp.int8 else 0)


def pages_that_fit(model: PlacedModel, page_size: int) -> int | None:
    """Number of pages, in all data shards together, that the devices' free memory holds.

    None where the backend does not tell how much memory there is, as on CPUs.
    """
    if model.mesh is not None:
        device, split = model.mesh.local_devices[0], model.mesh.shape["tensor"]
    else:
        (device,), split = model.batch_sharding.device_set, 1
    memory = device.memory_stats()
    if not memory or "bytes_limit" not in memory:
        return None
    free = memory["bytes_limit"] - memory.get("bytes_in_use", 0)
    per_device = pages_in(free, model.config.text, page_size, model.page_dtype, split)
    return model.shards * per_device


def pages_in(
    free: float, text: TextConfig, page_size: int, dtype: jnp.dtype, tensor: int = 1
) -> int:
    """Number of pages that one device's free memory holds, some left for what programs need.

    Args:
      free: bytes.
      text: sizes of the decoder.
      page_size: tokens per page.
      dtype: of keys and values.
      tensor: devices that heads are split over.
    """
    heads = text.num_kv_heads // tensor if text.num_kv_heads % tensor == 0 else text.num_kv_heads
    token_bytes = token_and_head_bytes(text.head_dim, dtype)
    page_bytes = 2 * text.num_layers * heads * page_size * token_bytes
    return int(SHARE_OF_FREE_MEMORY * max(free, 0) / page_bytes)
