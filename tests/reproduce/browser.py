"""Headless Chromium, by its DevTools protocol: what a page looks like to a reader."""

import base64
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from websocket import create_connection

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOOK = """({
    width: document.documentElement.clientWidth,
    scrolled: document.documentElement.scrollWidth,
    wide: [...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right >
        document.documentElement.clientWidth + 1).map(e => e.tagName + ' ' + e.className).slice(0, 5),
    images: document.images.length,
    broken: [...document.images].filter(e => !e.complete || !e.naturalWidth).length,
    lost: [...document.querySelectorAll('a[href^="#"]')].map(e => e.getAttribute('href').slice(1))
        .filter(one => one && !document.getElementById(decodeURIComponent(one))),
    repeated: [...document.querySelectorAll('[id]')].map(e => e.id)
        .filter((one, k, all) => all.indexOf(one) != k),
    files: [...document.querySelectorAll('a[href]')].map(e => e.getAttribute('href'))
        .filter(one => !/^(#|[a-z]+:)/.test(one)),
})"""


class Page:
    """A page in the browser; what it says to the console is kept in `said`."""

    def __init__(self, address: str) -> None:
        self._socket = create_connection(address, timeout=300, suppress_origin=True)
        self._numbers, self._session, self.said, self._loads = count(1), "", [], 0
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Log"):
            self.ask(f"{part}.enable")

    def ask(self, method: str, **values: Any) -> dict[str, Any]:
        """Call a method of the protocol; return its result."""
        number = next(self._numbers)
        session = {"sessionId": self._session} if self._session else {}
        self._socket.send(json.dumps({"id": number, "method": method, "params": values} | session))
        return self._until(lambda told: told.get("id") == number)["result"]

    def _until(self, wanted: Any) -> dict[str, Any]:
        while True:
            told = json.loads(self._socket.recv())
            if told.get("method") in (
                "Log.entryAdded",
                "Runtime.consoleAPICalled",
                "Runtime.exceptionThrown",
            ):
                self.said.append(told["params"])
            self._loads += told.get("method") == "Page.loadEventFired"
            if wanted(told):
                return told

    def look(self, path: Path, width: int, shot: Path | None = None) -> dict[str, Any]:
        """Open a file in a window of a width; return what `LOOK` finds, and take a picture if asked to."""
        sizes = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
        self.ask("Emulation.setDeviceMetricsOverride", **sizes)
        before = self._loads
        self.ask("Page.navigate", url=path.resolve().as_uri())
        if self._loads == before:
            self._until(lambda told: told.get("method") == "Page.loadEventFired")
        found = self.ask("Runtime.evaluate", expression=LOOK, returnByValue=True)
        if shot is not None:
            picture = self.ask("Page.captureScreenshot")
            shot.write_bytes(base64.b64decode(picture["data"]))
        return dict(found["result"]["value"])


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """Start Chromium with a folder for its own files, and yield a page."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    command = [str(BROWSER), *options, f"--user-data-dir={profile}", "about:blank"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            port, path = _told(profile / "DevToolsActivePort", process)
            yield Page(f"ws://127.0.0.1:{port}{path}")
        finally:
            process.kill()


def _told(place: Path, process: subprocess.Popen[bytes]) -> list[str]:
    """Wait for the two lines in which the browser says where it listens."""
    while process.poll() is None:
        if place.is_file() and len(lines := place.read_text().splitlines()) == 2:
            return lines
        time.sleep(0.1)
    raise RuntimeError(f"{BROWSER} ended with {process.returncode} before it listened")
