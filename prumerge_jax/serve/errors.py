"""Refusals in OpenAI's form: a status, one line with the number and the cure, and the field."""

from collections.abc import Mapping
from typing import Any

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}


class ApiError(Exception):
    """A request that is not answered.

    Attributes:
      status: HTTP status.
      message: one line.
      param: the field that is at fault, None where none is.
      code: a word for programs.
      headers: of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.message = " ".join(message.split())
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The response's body."""
        return {
            "error": {
                "message": _valid(self.message),
                "type": _TYPES.get(self.status, "invalid_request_error"),
                "param": None if self.param is None else _valid(self.param),
                "code": self.code,
            }
        }


def _valid(text: str) -> str:
    """The text without lone surrogates, which a client may send and JSON cannot carry."""
    return text.encode("utf-8", "backslashreplace").decode()
