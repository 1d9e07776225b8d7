"""API keys: who may ask."""

import base64
import binascii
import hashlib
import hmac
import os
import pathlib

from prumerge_jax.serve.errors import ApiError

_SHORTEST = 16


class Keys:
    """The keys of a file; without one, everybody may ask.

    A key is sent as `Authorization: Bearer KEY`, or, by a browser that opens the page, as the
    password of `Authorization: Basic`.

    Args:
      path: a file with one key a line; empty lines and those that begin with # do not count.

    Raises:
      ValueError: the file has no key, or a short one.
      OSError: the file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._digests: list[bytes] | None = None
        if path is None:
            return
        lines = [line.strip() for line in pathlib.Path(path).read_text().splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ValueError(f"--api_key_file {path} has no key; expected one a line")
        for number, key in enumerate(keys, start=1):
            if len(key) < _SHORTEST:
                raise ValueError(
                    f"--api_key_file {path}: key {number} has {len(key)} characters; expected at "
                    f"least {_SHORTEST}"
                )
        self._digests = [_digest(key.encode()) for key in keys]

    def check(self, authorization: bytes | None) -> None:
        """Takes as long for a wrong key as for the right one.

        Raises:
          ApiError: 401 no key, or another one.
        """
        if self._digests is None:
            return
        sent = _digest(_key(authorization or b""))
        # All are compared: which one is right takes no time to find out.
        if not sum(hmac.compare_digest(sent, digest) for digest in self._digests):
            raise ApiError(
                401,
                "the API key is missing or wrong; send 'Authorization: Bearer KEY'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": 'Basic realm="prumerge"'},
            )


def _key(authorization: bytes) -> bytes:
    scheme, _, rest = authorization.partition(b" ")
    if scheme.lower() == b"bearer":
        return rest.strip()
    if scheme.lower() == b"basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return b""
    return b""


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
