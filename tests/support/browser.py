"""Chromium without a window, driven over a pipe by its own protocol: a page, its keys, what it asks for.

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

LIMIT = 60.0
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}


def chromium() -> str:
    """Where it is; skips the test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs Chromium (apt install chromium): none of {', '.join(NAMES)} is on the PATH")
    return found


class Page:
    """The one page of a browser.

    Attributes:
        events: what was told of it, oldest first.
    """

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._held, self._number, self._session = read, write, b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> Any:
        """One command and what comes of it."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + LIMIT
        while True:
            answer = self._next(end)
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.events.append(answer)

    def js(self, expression: str) -> Any:
        """The value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + LIMIT
        while not self.js(expression):
            assert time.monotonic() < end, f"it never came true: {expression}"
            time.sleep(0.02)

    def go(self, url: str) -> None:
        """Open an address."""
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def press(self, key: str, *, shift: bool = False) -> None:
        """A key that is no letter."""
        text = {"Enter": "\r", " ": " "}.get(key, "")
        common = {
            "key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": KEYS[key],
            "modifiers": 8 if shift else 0,
        }  # fmt: skip
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **common)
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Text, where the focus is."""
        self.call("Input.insertText", text=text)

    def picture(self, path: Path, *, dark: bool = False) -> None:
        """The whole page as PNG, for people."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.js("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def told(self, method: str) -> list[dict[str, Any]]:
        """The parameters of all events of a kind."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def close(self) -> None:
        """End the browser."""
        self._session = ""
        self.call("Browser.close")

    def _next(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._held:
            assert select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0], "no answer"
            data = os.read(self._read, 1 << 20)
            assert data, "the browser is gone"
            self._held += data
        line, _, self._held = self._held.partition(b"\0")
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A browser with one empty page; its profile lies in `folder`."""
    path = chromium()
    theirs, ours = os.pipe(), os.pipe()
    command = [
        path, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder}", "--no-first-run",
        "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-sync",
        "--disable-component-update", "--disable-extensions", "--mute-audio", "--hide-scrollbars",
        "--window-size=1280,900",
    ]  # fmt: skip
    if os.geteuid() == 0:
        command.append("--no-sandbox")  # which it refuses to be root with
    script = f'exec "$@" 3<&{theirs[0]} 4>&{ours[1]}'  # where it looks for the pipe
    process = subprocess.Popen(
        ["bash", "-c", script, "bash", *command], pass_fds=(theirs[0], ours[1]),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs[0])
    os.close(ours[1])
    try:
        page = Page(ours[0], theirs[1])
        yield page
        page.close()
    finally:
        os.close(theirs[1])
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(ours[0])
