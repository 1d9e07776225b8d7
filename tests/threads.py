"""Threads that take each other for the processes of one run."""

import collections
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from orbax.checkpoint import multihost

from prumerge_jax.sharding import agreement


class Processes:
    """Stands in for several processes; what they tell each other goes through memory.

    An exception in one is its death, of which the others learn when they wait for it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._local = threading.local()
        self._changed = threading.Condition()
        self._count, self._ends = 1, [None]
        self._said: dict[int, dict[int, Any]] = {}
        monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(jax, "process_index", lambda: self._local.index)
        monkeypatch.setattr(jax, "process_count", lambda: self._count)
        monkeypatch.setattr(agreement, "FAREWELL_SECONDS", 0)
        barrier = lambda *, key, timeout_ms: self._exchange(key)  # noqa: E731
        monkeypatch.setattr(multihost, "get_barrier_sync_fn", lambda: barrier)
        monkeypatch.setattr(agreement.multihost_utils, "process_allgather", self._allgather)

    def run(self, count: int, action: Callable[[int], Any]) -> list[Any]:
        """What `action` of each process's index returned, or the exception that ended it."""
        self._count, self._ends = count, [None] * count
        self._said = collections.defaultdict(dict)

        def live(index: int) -> None:
            self._local.index, self._local.exchanges = index, 0
            try:
                end = action(index)
            except Exception as error:
                end = error
            with self._changed:
                self._ends[index] = end
                self._changed.notify_all()

        threads = [threading.Thread(target=live, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return self._ends

    def _exchange(self, value: Any) -> list[Any]:
        with self._changed:
            said = self._said[self._local.exchanges]
            self._local.exchanges += 1
            said[self._local.index] = value
            self._changed.notify_all()
            while len(said) < self._count:
                if any(isinstance(end, Exception) for end in self._ends):
                    raise ConnectionError("another process died")
                assert self._changed.wait(60), "a process neither came nor ended"
        return [said[index] for index in range(self._count)]

    def _allgather(self, own: np.ndarray) -> np.ndarray:
        return np.stack(self._exchange(own))


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    return Processes(monkeypatch)
