"""Images from other hosts, fetched so that a forged request reaches nothing it should not.

Only named hosts, only public addresses, and the connection goes to the very address that was
checked: a name that resolves to another one a moment later is of no use. No redirect is followed,
no proxy, cookie or credential of the environment is used.
"""

import concurrent.futures
import contextlib
import dataclasses
import http.client
import ipaddress
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence

from prumerge_jax.messages import quoted
from prumerge_jax.serve.errors import ApiError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Sequence[str]]
"""The addresses of a host, as text."""

_CHUNK = 1 << 16
_PORTS = {"https": 443, "http": 80}
_FETCHES = 8
"""Images that are fetched at once."""

_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
# Addresses that Python calls global, and behind which are others.
_TUNNELS = tuple(
    ipaddress.ip_network(network)
    for network in ("2002::/16", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "192.88.99.0/24")
)


def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host by the system's resolver."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return [str(address[0]) for *_, address in found]


def is_public(address: str) -> bool:
    """Whether an address is on the public internet, and leads nowhere else."""
    try:
        ip: Address = ipaddress.ip_address(address)
    except ValueError:  # one with a zone
        return False
    if isinstance(ip, ipaddress.IPv6Address) and ip not in _GLOBAL_UNICAST:
        return False
    if any(ip.version == network.version and ip in network for network in _TUNNELS):
        return False
    is_special = ip.is_multicast or ip.is_reserved or ip.is_unspecified or ip.is_loopback
    return ip.is_global and not is_special


@dataclasses.dataclass(frozen=True)
class FetchPolicy:
    """What may be fetched.

    Attributes:
      domains: the hosts, exactly.
      allow_http: http too, not only https.
      max_bytes: of an image.
      connect_seconds, total_seconds: for connecting, and for everything.
    """

    domains: frozenset[str]
    allow_http: bool
    max_bytes: int
    connect_seconds: float
    total_seconds: float


class Fetcher:
    """Fetches images under a policy.

    Args:
      policy: what may be fetched.
      resolver: finds a host's addresses.
      is_allowed: whether an address may be connected to.
      ports: the port of each scheme.
    """

    def __init__(
        self,
        policy: FetchPolicy,
        *,
        resolver: Resolve = resolve,
        is_allowed: Callable[[str], bool] = is_public,
        ports: dict[str, int] | None = None,
    ) -> None:
        self.policy, self._resolve, self._is_allowed = policy, resolver, is_allowed
        self._ports = ports or _PORTS
        self._context = ssl.create_default_context()
        self._threads = concurrent.futures.ThreadPoolExecutor(_FETCHES, "fetch")

    def submit(self, url: str) -> concurrent.futures.Future[bytes]:
        """The bytes at an URL, or an `ApiError`, when they have come.

        Raises:
          ApiError: the URL is not allowed.
        """
        target = self._target(url)
        return self._threads.submit(self._fetch, *target)

    def close(self) -> None:
        """Ends without waiting for what is being fetched."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _target(self, url: str) -> tuple[str, str, str]:
        """Scheme, host and path of an allowed URL."""
        if not self.policy.domains:
            raise _refused(
                url, "this server fetches nothing; send the image as 'data:image/...;base64,...'"
            )
        if not url.isascii() or not url.isprintable() or set(url) & set("\\ "):
            raise _refused(url, "expected ASCII without spaces; encode other characters with %")
        try:
            parts = urllib.parse.urlsplit(url)
            port = parts.port
        except ValueError:
            raise _refused(url, "not a valid URL") from None
        schemes = ["https", "http"] if self.policy.allow_http else ["https"]
        if parts.scheme not in schemes:
            raise _refused(url, f"expected {' or '.join(schemes)}, or a data URL")
        host = parts.hostname or ""
        if "@" in parts.netloc or host not in self.policy.domains:
            allowed = ", ".join(sorted(self.policy.domains))
            raise _refused(url, f"the host is not allowed; expected one of {allowed}")
        if port not in (None, _PORTS[parts.scheme]):
            raise _refused(url, f"port {port} is not allowed; leave it out")
        path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        return parts.scheme, host, path if path.startswith("/") else f"/{path}"

    def _fetch(self, scheme: str, host: str, path: str) -> bytes:
        where = f"{scheme}://{host}{path}"
        with _Connection(self.policy.total_seconds) as connection:
            try:
                address = self._address(where, host, self._ports[scheme])
                context = self._context if scheme == "https" else None
                connection.open(
                    address, self._ports[scheme], self.policy.connect_seconds, host, context
                )
                return self._get(where, host, path, connection)
            except (OSError, http.client.HTTPException) as error:
                reason = f"cannot be fetched ({type(error).__name__})"
                if connection.is_late:
                    reason = f"took more than {self.policy.total_seconds:g} seconds"
                raise _failed(where, reason) from error

    def _address(self, where: str, host: str, port: int) -> str:
        """An address of the host, all of which are allowed."""
        addresses = self._resolve(host, port)
        if not addresses or not all(map(self._is_allowed, addresses)):
            raise _refused(where, "its host has an address that is not public")
        return addresses[0]

    def _get(self, where: str, host: str, path: str, opened: "_Connection") -> bytes:
        connection = http.client.HTTPConnection(host)
        connection.sock = opened.socket
        accepted = {"Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}
        connection.request("GET", path, headers=accepted)
        response = connection.getresponse()
        if response.status != 200:
            advice = "; redirects are not followed" if 300 <= response.status < 400 else ""
            raise _failed(where, f"was answered with {response.status}{advice}")
        if response.getheader("Content-Encoding", "identity") != "identity":
            raise _failed(where, "comes compressed")
        chunks, size = [], 0
        while chunk := response.read(_CHUNK):
            chunks.append(chunk)
            size += len(chunk)
            if size > self.policy.max_bytes:
                raise too_large(where, self.policy.max_bytes)
        if opened.is_late:  # and what looks like the end of the content is not
            raise TimeoutError
        if response.length:
            raise _failed(where, f"ended {response.length} bytes early")
        return b"".join(chunks)


class _Connection:
    """A connection that ends at its deadline, however slowly bytes drip.

    Attributes:
      socket: of the open connection.
    """

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True
        self.socket: socket.socket | None = None

    def __enter__(self) -> "_Connection":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if self.socket is not None:
            self.socket.close()

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() >= self._deadline

    def open(
        self, address: str, port: int, seconds: float, host: str, context: ssl.SSLContext | None
    ) -> None:
        """Connects to an address; with a context by TLS, to the host of that name.

        Raises:
          OSError: nobody answers in time, or the certificate is not the host's.
        """
        self.socket = socket.create_connection((address, port), seconds)
        if context is not None:
            # Without the handshake, so that the deadline already ends this one.
            self.socket = encrypted = context.wrap_socket(
                self.socket, server_hostname=host, do_handshake_on_connect=False
            )
            encrypted.do_handshake()
        if self.is_late:
            raise TimeoutError

    def _end(self) -> None:
        if self.socket is not None:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)


def too_large(name: str, limit: int) -> ApiError:
    """The refusal of an image that has more than `limit` bytes."""
    return ApiError(
        413,
        f"image {quoted(name)} has more than {limit:,} bytes; send a smaller one",
        param="image_url",
        code="image_too_large",
    )


def _refused(url: str, reason: str) -> ApiError:
    return ApiError(
        400, f"image URL {quoted(url)}: {reason}", param="image_url", code="image_url_not_allowed"
    )


def _failed(url: str, reason: str) -> ApiError:
    return ApiError(
        422,
        f"image {quoted(url)} {reason}; send it as 'data:image/...;base64,...'",
        param="image_url",
        code="image_not_fetched",
    )
