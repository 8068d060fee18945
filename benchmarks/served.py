"""The dashboard's server, started for a run of the browser, and what a page of it says of itself."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

from benchmarks.browser import Browser, wait

ROOT = Path(__file__).parent.parent
STATE = "document.querySelector('[data-testid=stApp]')?.getAttribute('data-test-script-state')"
TITLE = "!!document.querySelector('[data-testid=stMain] h1')"
BOXES = "[...document.querySelectorAll('[data-testid=stException], [data-testid=stAlertContentError]')].map(e => e.innerText)"


class App:
    """The dashboard's server, started for this run."""

    def __init__(self, words: list[str]):
        """:param words: what the app is opened with."""
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            self.port = listening.getsockname()[1]
        command = [sys.executable, "-m", "streamlit", "run", str(ROOT / "app.py"), "--server.headless", "true"]
        command += ["--server.port", str(self.port), "--server.fileWatcherType", "none", "--", *words]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait(self._up, "the dashboard's server did not start")

    def _up(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://localhost:{self.port}/_stcore/health", timeout=1) as answer:
                return answer.status == 200
        except OSError:
            return False

    def address(self, page: str, query: str = "") -> str:
        """Of a page, by its file's name in dashboard/; `recording` is the home page."""
        home = "" if page == "recording" else page
        return f"http://localhost:{self.port}/{home}?{urllib.parse.quote(query, safe='=&')}"

    def computed(self) -> float:
        """Seconds that the server has computed: what a busy machine does not lengthen. 0 where the system does not tell."""
        told = Path(f"/proc/{self.process.pid}/stat")
        if not told.exists():
            return 0.0
        user, system = told.read_text().rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)


def opened(browser: Browser, page: str) -> None:
    """Wait until a page is there, its charts too."""
    wait(lambda: browser.run(TITLE), f"{page} did not appear")
    settle(browser)
    drawn(browser)
    time.sleep(1.0)  # charts are drawn after the script has ended


def drawn(browser: Browser) -> None:
    """Wait until no grey box stands for what the browser has yet to load; a busy machine takes its time."""
    wait(lambda: not browser.run("!!document.querySelector('[data-testid=stSkeleton]')"), "the page was never drawn", 60)


def settle(browser: Browser) -> float:
    """Wait until the script has run and has stayed so for a moment; seconds until it first had."""
    seconds = wait(lambda: browser.run(STATE) == "notRunning", "the page never finished")
    for _ in range(5):
        time.sleep(0.1)
        if browser.run(STATE) != "notRunning":
            return seconds + settle(browser)
    return seconds


def troubles(browser: Browser) -> list[str]:
    """Exception boxes, error messages and what the console told since the last time.

    Streamlit looks for its own address below the page's before it finds it; those 404 are no trouble.
    """
    found = [*browser.run(BOXES), *(told for told in browser.troubles if "/_stcore/" not in told)]
    browser.troubles.clear()
    return found
