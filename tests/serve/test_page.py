"""The page in a headless Chromium: an image is chosen, a question asked, the answers streamed."""

import base64
import json
import os
import pathlib
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.test_live import Process, image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium"),
]


class Browser:
    """A Chromium that is driven through two pipes."""

    def __init__(self, profile: pathlib.Path) -> None:
        their_input, self._out = os.pipe()
        self._in, their_output = os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --remote-debugging-pipe --no-first-run"
        command = f'exec "$0" {flags} --user-data-dir="$1" 3<&{their_input} 4>&{their_output}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, str(CHROMIUM), str(profile)],
            pass_fds=(their_input, their_output),
            stderr=subprocess.DEVNULL,
        )
        os.close(their_input)
        os.close(their_output)
        self._number, self._rest, self._session = 0, b"", ""

    def open(self, url: str) -> None:
        target = self.call("Target.createTarget", url=url)["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]

    def call(self, method: str, **params: Any) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                read = os.read(self._in, 1 << 16)
                assert read, "the browser ended"
                self._rest += read
            line, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def evaluate(self, expression: str) -> Any:
        return self.call("Runtime.evaluate", expression=expression)["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not self.evaluate(expression):
            assert time.monotonic() < until, (expression, self.evaluate("document.body.innerText"))
            time.sleep(0.1)

    def choose(self, selector: str, file: pathlib.Path) -> None:
        found = self.call("Runtime.evaluate", expression=f"document.querySelector('{selector}')")
        handle = found["result"]["objectId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], objectId=handle)

    def screenshot(self, path: pathlib.Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._in)
        os.close(self._out)


@pytest.fixture(scope="module")
def server() -> Iterator[Process]:
    process = Process()
    yield process
    process.close()


@pytest.fixture
def browser(tmp_path: pathlib.Path) -> Iterator[Browser]:
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_an_image_is_asked_about(
    server: Process, browser: Browser, tmp_path: pathlib.Path, width: int, scheme: str
) -> None:
    picture = tmp_path / "image.png"
    picture.write_bytes(image(0))
    browser.open(f"{server.url}/")
    browser.call(
        "Emulation.setDeviceMetricsOverride",
        width=width, height=900, deviceScaleFactor=1, mobile=width < 500,
    )  # fmt: skip
    scheme_feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.call("Emulation.setEmulatedMedia", features=[scheme_feature])
    browser.wait_for("document.querySelectorAll('#reduction option').length === 3")
    browser.choose("#file", picture)
    browser.wait_for("state.explained && state.explained.patch_indices.length > 0")
    browser.evaluate("document.querySelector('#question').value = 'How many digits are there?'")
    browser.evaluate("document.querySelector('#question').focus()")
    for kind in ("keyDown", "keyUp"):
        browser.call(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter",
            windowsVirtualKeyCode=13, text="\r" if kind == "keyDown" else "",
        )  # fmt: skip
    browser.wait_for("document.querySelectorAll('#full dd').length === 4")
    answers = browser.evaluate("[...document.querySelectorAll('.answer')].map(a => a.innerText)+''")
    assert answers.strip(",")
    facts = browser.evaluate("document.querySelector('#full dd').innerText")
    assert facts == "144 of 144"
    assert browser.evaluate("document.querySelector('#error').innerText") == ""
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    browser.screenshot(tmp_path / f"{scheme}.png")
