"""How much may be in the server at once; one event loop owns it."""

import contextlib
from collections.abc import Iterator

from prumerge_jax.serve.errors import ApiError

_RETRY_AFTER = "1"


class Admission:
    """Counts the requests that are being answered, and the bytes that they hold.

    Attributes:
      max_requests, max_bytes: the limits.
      requests, held_bytes: what is in the server now.
      draining: nothing more is admitted.
    """

    def __init__(self, max_requests: int, max_bytes: int) -> None:
        self.max_requests, self.max_bytes = max_requests, max_bytes
        self.requests = self.held_bytes = 0
        self.draining = False

    @contextlib.contextmanager
    def admit(self) -> Iterator["Hold"]:
        """One request, as long as the context lasts.

        Raises:
          ApiError: 503 while the server ends, 429 when it is full.
        """
        if self.draining:
            raise ApiError(503, "the server is shutting down; ask another one", code="draining")
        if self.requests >= self.max_requests:
            raise _full(f"{self.requests} requests are being answered, as many as it takes")
        self.requests += 1
        hold = Hold(self)
        try:
            yield hold
        finally:
            self.requests -= 1
            self.held_bytes -= hold.held_bytes
            hold.held_bytes = 0


class Hold:
    """What one request holds.

    Attributes:
      held_bytes: of its body and its image.
    """

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.held_bytes = 0

    def add(self, count: int) -> None:
        """Takes so many bytes more.

        Raises:
          ApiError: 429, the server holds too many.
        """
        admission = self._admission
        if admission.held_bytes + count > admission.max_bytes:
            raise _full(
                f"its requests hold {admission.held_bytes:,} of {admission.max_bytes:,} bytes, and "
                f"this one needs {count:,} more"
            )
        admission.held_bytes += count
        self.held_bytes += count


def _full(reason: str) -> ApiError:
    return ApiError(
        429,
        f"the server is full: {reason}; try again in {_RETRY_AFTER} s",
        code="queue_full",
        headers={"Retry-After": _RETRY_AFTER},
    )
