"""Images from other hosts: what forged requests may not reach, by name, redirect and rebinding."""

import contextlib
import dataclasses
import http.server
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from prumerge_jax.serve.errors import ApiError
from prumerge_jax.serve.fetch import Fetcher, FetchPolicy, is_public
from tests.serve.fakes import png

POLICY = FetchPolicy(frozenset({"images.example.org"}), False, 100_000, 2.0, 2.0)
ADDRESS = "93.184.216.34"


def refused(fetcher: Fetcher, url: str) -> ApiError:
    with pytest.raises(ApiError) as raised:
        fetcher.submit(url).result(timeout=20)
    return raised.value


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.9.9.9", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254",
     "100.64.0.1", "0.0.0.0", "224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1",
     "198.18.0.1", "192.88.99.1", "::", "::1", "::ffff:93.184.216.34", "::ffff:127.0.0.1",
     "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "2001:db8::1",
     "2002:7f00:1::", "64:ff9b::7f00:1", "64:ff9b:1::1", "2001:0:7f00:1::", "fec0::1",
     "localhost", "", "2130706433", "0x7f.1"],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)
    fetcher = Fetcher(POLICY, resolver=lambda host, port: [ADDRESS, address])
    error = refused(fetcher, "https://images.example.org/a.png")
    assert error.status == 400
    assert "an address that is not public" in error.message


@pytest.mark.parametrize("address", [ADDRESS, "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://example.org/a.png", "the host is not allowed; expected one of images."),
        ("https://images.example.org.evil.net/", "the host is not allowed"),
        ("https://evil.net#@images.example.org/", "the host is not allowed"),
        ("https://images.example.org@evil.net/", "the host is not allowed"),
        ("https://user:password@images.example.org/", "the host is not allowed"),
        ("https://images.example.org\\@evil.net/", "expected ASCII without spaces"),
        ("https://images.example.org /", "expected ASCII without spaces"),
        ("https://images.example.org/\r\nHost: evil", "expected ASCII without spaces"),
        ("https://xn--images.example.org/", "the host is not allowed"),
        ("https://imag\u0435s.example.org/", "expected ASCII"),
        ("https://images.example.org./", "the host is not allowed"),
        ("https://127.0.0.1/", "the host is not allowed"),
        ("https://[::1]/", "the host is not allowed"),
        ("https://[::1/", "not a valid URL"),
        ("https:///a.png", "the host is not allowed"),
        ("http://images.example.org/a.png", "expected https, or a data URL"),
        ("https://images.example.org:22/", "port 22 is not allowed"),
        ("https://images.example.org:80/", "port 80 is not allowed"),
        ("https://images.example.org:99999/", "not a valid URL"),
        ("https://images.example.org:x/", "not a valid URL"),
    ],
)
def test_urls_that_are_refused_before_anything_is_resolved(url: str, reason: str) -> None:
    def resolver(host: str, port: int) -> list[str]:
        raise AssertionError("resolved")

    error = refused(Fetcher(POLICY, resolver=resolver), url)
    assert error.status == 400
    assert reason in error.message


def test_off_by_default() -> None:
    off = dataclasses.replace(POLICY, domains=frozenset())
    assert "this server fetches nothing" in refused(Fetcher(off), "https://a.b/c.png").message


class Handler(http.server.BaseHTTPRequestHandler):
    seen: list[tuple[str, dict[str, str]]] = []

    def do_GET(self) -> None:
        self.seen.append((self.path, dict(self.headers)))
        kind = self.path.partition("?")[0]
        if kind == "/redirect":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1/secret")
            self.end_headers()
            return
        if kind == "/missing":
            self.send_error(404)
            return
        self.send_response(200)
        if kind == "/zip":
            self.send_header("Content-Encoding", "gzip")
        content = b"\0" * 100_001 if kind == "/large" else png()
        if kind == "/short":
            self.send_header("Content-Length", str(len(content) + 9))
        self.end_headers()
        with contextlib.suppress(OSError):
            if kind == "/drip":
                for _ in range(100):
                    self.wfile.write(b"\0")
                    time.sleep(0.1)
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()


def local(port: int, **changes: object) -> Fetcher:
    """A fetcher for which the host of the policy is a server on this machine."""
    policy = dataclasses.replace(POLICY, allow_http=True, **changes)
    return Fetcher(
        policy,
        resolver=lambda host, port: ["127.0.0.1"],
        is_allowed=lambda address: address == "127.0.0.1",
        ports={"http": port, "https": port},
    )


def test_an_image_comes_from_the_checked_address(port: int, monkeypatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    Handler.seen.clear()
    fetcher = local(port)
    assert fetcher.submit("http://images.example.org/a.png?b=c#d").result(timeout=20) == png()
    ((path, headers),) = Handler.seen
    assert path == "/a.png?b=c"
    assert headers["Host"] == "images.example.org"
    assert headers["Accept-Encoding"] == "identity"
    assert not {"Cookie", "Authorization"} & set(headers)


def test_a_name_that_is_rebound_is_of_no_use(port: int) -> None:
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    fetcher = local(port)
    fetcher._resolve = lambda host, port: next(answers)
    assert fetcher.submit("http://images.example.org/").result(timeout=20) == png()
    assert next(answers) == ["10.0.0.1"]  # was asked for once


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [
        ("redirect", 422, "302; redirects are not followed"),
        ("missing", 422, "was answered with 404"),
        ("large", 413, "more than 100,000 bytes"),
        ("zip", 422, "comes compressed"),
        ("short", 422, "ended 9 bytes early"),
        ("drip", 422, "took more than 2 seconds"),
    ],
)
def test_answers_that_are_refused(port: int, path: str, status: int, reason: str) -> None:
    started = time.monotonic()
    error = refused(local(port), f"http://images.example.org/{path}")
    assert (error.status, reason in error.message) == (status, True), error.message
    assert time.monotonic() - started < 10


def test_a_host_that_says_nothing() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        fetcher = local(silent.getsockname()[1], total_seconds=0.5)
        for scheme in ("http", "https"):
            error = refused(fetcher, f"{scheme}://images.example.org/")
            assert "took more than 0.5 seconds" in error.message
    error = refused(fetcher, "http://images.example.org/")
    assert "cannot be fetched (ConnectionRefusedError)" in error.message


def test_a_certificate_is_checked(port: int) -> None:
    error = refused(local(port), "https://images.example.org/")
    assert "cannot be fetched (SSL" in error.message
