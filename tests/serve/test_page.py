"""The page in a headless Chromium: an image is chosen, a question asked, the answers streamed."""

import base64
import json
import os
import pathlib
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.serve.test_live import Process, image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --remote-debugging-pipe"
)
DARKENED = """(() => {
  const canvas = document.querySelector("#canvas"), checkbox = document.querySelector("#patches");
  const pen = canvas.getContext("2d"), middle = (place) => (place + 0.5) * 56;
  const colour = (patch) =>
    pen.getImageData(middle(patch % 12), middle(Math.floor(patch / 12)), 1, 1).data.join();
  const colours = () => [...Array(144).keys()].map(colour);
  const shown = colours(), before = checkbox.checked;
  checkbox.checked = false, draw();
  const plain = colours();
  checkbox.checked = before, draw();
  return shown.filter((seen, patch) => seen !== plain[patch]).length;
})()"""
"""Number of patches that are drawn otherwise than the image has them."""
COUNT_PIECES = """window.pieces = 0;
new MutationObserver((changes) => { pieces += changes.length; }).observe(
  document.querySelector("#full .answer"), { childList: true });"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt install chromium"),
]


class Browser:
    """A Chromium that is driven through two pipes."""

    def __init__(self, profile: pathlib.Path) -> None:
        their_input, self._out = os.pipe()
        self._in, their_output = os.pipe()
        command = f'exec "$0" {FLAGS} --user-data-dir="$1" 3<&{their_input} 4>&{their_output}'
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

    def drop(self, selector: str, file: pathlib.Path) -> None:
        data = {"items": [], "files": [str(file)], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.call("Input.dispatchDragEvent", type=kind, data=data, **self._middle(selector))

    def click(self, selector: str) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent",
                type=kind, button="left", clickCount=1, **self._middle(selector),
            )  # fmt: skip

    def press(self, key: str) -> None:
        code = {"Tab": 9, "Enter": 13}.get(key, ord(key[0].upper()))
        text = {"Tab": "", "Enter": "\r"}.get(key, key)
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code,
                text=text if kind == "keyDown" else "",
            )  # fmt: skip

    def text(self, selector: str) -> str:
        return self.evaluate(f"document.querySelector('{selector}').innerText")

    def _middle(self, selector: str) -> dict[str, float]:
        element = f"document.querySelector('{selector}')"
        self.evaluate(f"{element}.scrollIntoView({{block: 'center'}})")
        box = json.loads(self.evaluate(f"JSON.stringify({element}.getBoundingClientRect())"))
        return {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}

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


def opened(browser: Browser, server: Process, width: int, scheme: str) -> None:
    """The page, ready to be used."""
    browser.open(f"{server.url}/")
    browser.call(
        "Emulation.setDeviceMetricsOverride",
        width=width, height=900, deviceScaleFactor=1, mobile=width < 500,
    )  # fmt: skip
    scheme_feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.call("Emulation.setEmulatedMedia", features=[scheme_feature])
    browser.wait_for("document.querySelectorAll('#method option').length === 3")
    browser.evaluate(COUNT_PIECES)


def check_answers(browser: Browser, reduction: str, visual: int) -> None:
    """Both answers with their figures, streamed; nothing went wrong, and all of it is in view."""
    browser.wait_for("document.querySelectorAll('#full dd').length === 4")
    assert browser.text("#reduced h2") == f"Answer ({reduction})"
    assert browser.text("#reduced .answer")
    assert browser.text("#full .answer")
    assert browser.evaluate("pieces") > 2
    counts = [browser.text(f"#{name} dd") for name in ("reduced", "full")]
    assert counts == [f"{visual} of 144", "144 of 144"]
    facts = browser.text("#reduced dl")
    assert re.search(r"first token\s+\d+ ms\s+in all\s+\d+ ms", facts)
    assert browser.text("#error") == ""
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_an_image_is_dropped_and_asked_about_with_the_mouse(
    server: Process, browser: Browser, tmp_path: pathlib.Path
) -> None:
    picture = tmp_path / "image.png"
    picture.write_bytes(image(0))
    opened(browser, server, 1200, "light")
    browser.drop("#drop", picture)
    browser.wait_for("state.explained && state.explained.patch_indices.length > 0")
    kept = browser.evaluate("state.explained.patch_indices.length")
    assert 0 < kept < 144
    assert browser.evaluate(DARKENED) == 144 - kept
    browser.click("#patches")
    assert browser.evaluate(DARKENED) == 0
    browser.click("#patches")
    browser.click("#ask")
    check_answers(browser, "prumerge", browser.evaluate("state.explained.patch_indices.length") + 1)
    browser.screenshot(tmp_path / "light.png")


def test_an_image_is_chosen_and_asked_about_with_the_keyboard_on_a_phone(
    server: Process, browser: Browser, tmp_path: pathlib.Path
) -> None:
    picture = tmp_path / "image.png"
    picture.write_bytes(image(1))
    opened(browser, server, 390, "dark")
    browser.choose("#file", picture)
    browser.wait_for("!!state.explained")
    browser.press("Tab")
    assert browser.evaluate("document.activeElement.id") == "drop"
    for expected in ("patches", "question", "method"):
        browser.press("Tab")
        assert browser.evaluate("document.activeElement.id") == expected
    browser.press("c")  # of the options the one that begins so
    browser.wait_for("document.querySelector('#budget').value === 'cover:tokens=32'")
    browser.wait_for("state.explained.reduction === 'cover:tokens=32'")
    assert browser.evaluate(DARKENED) == 144 - 32
    browser.press("Tab")  # the only budget is no choice, so that the button comes next
    assert browser.evaluate("document.activeElement.id") == "ask"
    browser.press("Enter")
    check_answers(browser, "cover:tokens=32", 32)
    browser.screenshot(tmp_path / "dark.png")


def test_what_goes_wrong_is_said(server: Process, browser: Browser, tmp_path: pathlib.Path) -> None:
    picture = tmp_path / "image.png"
    picture.write_bytes(b"none")
    opened(browser, server, 1200, "dark")
    browser.choose("#file", picture)
    browser.wait_for("document.querySelector('#error').innerText.includes('not an image')")
    browser.evaluate("document.querySelector('#question').value = 'an <image>'")
    browser.click("#ask")
    browser.wait_for("document.querySelector('#error').innerText.includes('<image>')")
    assert browser.evaluate("document.querySelector('#ask').disabled") is False
