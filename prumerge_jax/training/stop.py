"""A polite end: a signal asks, the loop stops at the next step boundary and saves."""

import logging
import signal
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_logger = logging.getLogger(__name__)


class StopFlag:
    """Whether the run was asked to stop, and why."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is not None

    def request(self, reason: str) -> None:
        """Asks the run to stop at its next step boundary."""
        self.reason = reason


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """A flag that SIGTERM and SIGINT raise; a second signal of either kind ends at once."""
    flag = StopFlag()
    previous: dict[int, Any] = {}

    def handle(number: int, frame: types.FrameType | None) -> None:
        name = signal.Signals(number).name
        _logger.info("%s: stopping after this step, with a checkpoint", name)
        flag.request(name)
        signal.signal(number, previous[number])

    for number in (signal.SIGTERM.value, signal.SIGINT.value):
        previous[number] = signal.signal(number, handle)
    try:
        yield flag
    finally:
        for number in previous:
            signal.signal(number, previous[number])
