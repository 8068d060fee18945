"""A headless Chromium, driven over its DevTools protocol: just enough to open pages, click, listen and take pictures."""

from __future__ import annotations

import base64
import io
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from policies.errors import UserError

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-port=0", "--remote-allow-origins=*",
)  # fmt: skip
NAMES = ("chromium", "chromium-browser", "google-chrome")


class Browser:
    """One tab. ``troubles`` collects what the console complained about, in order."""

    def __init__(self, width: int = 1280, height: int = 900):
        """:raises UserError: when no Chromium is installed."""
        binary = next((found for name in NAMES if (found := shutil.which(name))), None)
        if binary is None:
            raise UserError(f"no browser found ({', '.join(NAMES)}): install one, for example with apt-get install chromium")
        self.width, self.height = width, height
        self.troubles: list[str] = []
        self._folder = tempfile.mkdtemp(prefix="dashboard-browser-")
        command = [binary, *FLAGS, f"--user-data-dir={self._folder}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._number = 0
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        from websockets.sync.client import connect

        told = Path(self._folder) / "DevToolsActivePort"
        wait(told.exists, "the browser did not start")
        wait(lambda: len(told.read_text().split()) > 1, "the browser did not start")
        port = told.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            tab = next(entry for entry in json.load(answer) if entry["type"] == "page")
        self._socket = connect(tab["webSocketDebuggerUrl"], max_size=None)
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")
        self.resize(self.height)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command and its answer; events that come between are looked through for troubles."""
        self._number += 1
        self._socket.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=120))
            if message.get("id") == self._number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self._hear(message)

    def _hear(self, event: dict[str, Any]) -> None:
        told = event.get("params", {})
        if event["method"] == "Runtime.exceptionThrown":
            self.troubles.append(told["exceptionDetails"].get("exception", {}).get("description", "an exception"))
        elif event["method"] == "Runtime.consoleAPICalled" and told["type"] == "error":
            self.troubles.append(" ".join(str(each.get("value", each.get("description"))) for each in told["args"]))
        elif event["method"] == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.troubles.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")

    def go(self, url: str) -> None:
        self.send("Page.navigate", url=url)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"].get("description", script))
        return answer["result"].get("value")

    def resize(self, height: int) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=self.width, height=height, deviceScaleFactor=1, mobile=False)

    def theme(self, name: str) -> None:
        """What the page is told of the user's taste: "light" or "dark"."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def click(self, x: float, y: float) -> None:
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            pressed = {"button": "left", "clickCount": 1} if kind != "mouseMoved" else {}
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, **pressed)

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=start[0], y=start[1])
        self.send("Input.dispatchMouseEvent", type="mousePressed", x=start[0], y=start[1], button="left", clickCount=1)
        for step in range(1, 6):
            x, y = (a + (b - a) * step / 5 for a, b in zip(start, end, strict=True))
            self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, button="left", buttons=1)
        self.send("Input.dispatchMouseEvent", type="mouseReleased", x=end[0], y=end[1], button="left", clickCount=1)

    def press(self, key: str) -> None:
        """Tab or Enter."""
        told = {"key": key, "code": key, "windowsVirtualKeyCode": {"Enter": 13, "Tab": 9}[key]}
        if key == "Enter":
            told["text"] = told["unmodifiedText"] = "\r"
        self.send("Input.dispatchKeyEvent", type="keyDown" if "text" in told else "rawKeyDown", **told)
        self.send("Input.dispatchKeyEvent", type="keyUp", **told)

    def picture(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def pixels(self) -> np.ndarray:
        """What the window shows now, uint8 [height, width, 3]."""
        from PIL import Image

        content = base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    def close(self) -> None:
        if socket := getattr(self, "_socket", None):
            socket.close()
        self._process.terminate()
        self._process.wait(timeout=30)
        shutil.rmtree(self._folder, ignore_errors=True)


def compact(path: Path, largest: int) -> int:
    """Write a picture again in as few bytes as lose nothing, or, where those are more than ``largest``, with 256 colours
    (an octree keeps the rare ones, which charts are made of); its bytes."""
    from PIL import Image

    picture = Image.open(path).convert("RGB")
    picture.save(path, optimize=True)
    if path.stat().st_size > largest:
        picture.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)
    return path.stat().st_size


def wait(ready: Callable[[], Any], otherwise: str, seconds: float = 300.0) -> float:
    """Seconds until ``ready()`` is true. Raises RuntimeError after ``seconds``."""
    started = time.perf_counter()
    while not ready():
        if time.perf_counter() - started > seconds:
            raise RuntimeError(otherwise)
        time.sleep(0.03)
    return time.perf_counter() - started
