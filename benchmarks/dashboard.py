"""The dashboard in a real browser: ``python -m benchmarks.dashboard [TRACE ...]``.

Opens every page, clicks through the main flow, looks for exception boxes, error messages and console errors, times first
paint and interactions, and writes pictures. Exits 1 when something was wrong. Needs a Chromium (apt-get install chromium).
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from benchmarks.browser import Browser, wait
from policies.errors import run_command

ROOT = Path(__file__).parent.parent
PAGES = ("recording", "entropy", "lab", "explorer", "compare", "pareto", "cost")
STATE = "document.querySelector('[data-testid=stApp]')?.getAttribute('data-test-script-state')"
BOXES = "[...document.querySelectorAll('[data-testid=stException], [data-testid=stAlertContentError]')].map(e => e.innerText)"
SCROLLED = "document.querySelectorAll('[data-testid=stMain], [data-testid=stSidebarContent]')"
HEIGHT = f"Math.max(...[...{SCROLLED}].map(e => e.scrollHeight))"


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.dashboard", description=__doc__.split("\n")[0])
    parse.add_argument("arguments", nargs="*", metavar="TRACE", help="what the app is opened with (default: nothing)")
    parse.add_argument("--option", action="append", default=[], metavar="WORD", help="further words for the app")
    parse.add_argument("--out", type=Path, default=Path("build/dashboard"), help="where pictures go")
    parse.add_argument("--page", action="append", default=[], choices=PAGES, help="may be repeated (default: all)")
    parse.add_argument("--query", default="", help="query parameters for every page, for example 'recording=mine'")
    parse.add_argument("--dark", action="store_true", help="take pictures in the dark theme too")
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    port = free_port()
    server = start_server(port, [*args.arguments, *args.option])
    wrong: list[str] = []
    try:
        browser = Browser()
        try:
            for page in args.page or PAGES:
                wrong += [f"{page}: {trouble}" for trouble in visit(browser, port, page, args)]
            if not args.page:
                wrong += [f"main flow: {trouble}" for trouble in main_flow(browser, port, args)]
        finally:
            browser.close()
    finally:
        server.terminate()
        server.wait(timeout=30)
    print("\n".join(wrong) if wrong else "no exception box, no error message, no console error")
    if wrong:
        sys.exit(1)


def visit(browser: Browser, port: int, page: str, args: argparse.Namespace) -> list[str]:
    """Open one page twice (the second opening finds everything remembered) and picture it; what was wrong with it.

    Streamlit looks for its own address below the page's before it finds it; those 404 are no trouble.
    """
    times = []
    for _ in range(2):
        browser.resize(browser.height)
        browser.go("about:blank")
        started = time.perf_counter()
        browser.go(f"http://localhost:{port}/{'' if page == PAGES[0] else page}?{args.query}")
        wait(lambda: browser.run("!!document.querySelector('[data-testid=stMain] h1')"), f"{page} did not appear")
        painted = time.perf_counter() - started
        settle(browser)
        times.append((painted, time.perf_counter() - started))
    print(f"{page:10} first paint {times[1][0]:.1f} s, complete {times[1][1]:.1f} s (nothing remembered: {times[0][1]:.1f} s)")
    for theme in ("light", "dark") if args.dark else ("light",):
        browser.theme(theme)
        whole_page(browser, args.out / f"{page}-{theme}.png")
    browser.theme("light")
    wrong = [*browser.run(BOXES), *(told for told in browser.troubles if "/_stcore/" not in told)]
    browser.troubles.clear()
    return wrong


def main_flow(browser: Browser, port: int, args: argparse.Namespace) -> list[str]:
    """What a reader does first, with mouse and keyboard: each step timed from the input to the finished page."""
    steps = {
        "brush a range of entropies": ("entropy", brush, "range_draft_entropy="),
        "turn a policy's parameter": ("lab", turn, "study="),
        "click a token": ("explorer", click_token, "at="),
        "go on by keyboard": ("explorer", next_cycle, "at="),
    }
    wrong = []
    for name, (page, act, mark) in steps.items():
        browser.resize(browser.height)
        browser.go(f"http://localhost:{port}/{page}?{args.query}")
        wait(lambda: browser.run("!!document.querySelector('[data-testid=stMain] h1')"), f"{page} did not appear")
        settle(browser)
        time.sleep(1.0)  # charts are drawn after the script has ended
        act(browser)
        started = time.perf_counter()
        try:
            wait(lambda mark=mark: mark in browser.run("location.search"), f"{name}: the address did not change", 15)
            wait(lambda: browser.run(STATE) == "notRunning", f"{name}: the page never finished")
            print(f"{name}: {time.perf_counter() - started:.2f} s")
        except RuntimeError as error:
            wrong.append(str(error))
        settle(browser)
        browser.picture(args.out / f"flow-{name.replace(' ', '-')}.png")
        wrong += [*browser.run(BOXES), *(told for told in browser.troubles if "/_stcore/" not in told)]
        browser.troubles.clear()
    return wrong


def place(browser: Browser, selector: str, number: int = 0) -> tuple[float, float, float, float]:
    """Left, top, width and height of an element, scrolled into view."""
    element = f"document.querySelectorAll({selector!r})[{number}]"
    browser.run(f"{element}.scrollIntoView({{block: 'center'}})")
    time.sleep(0.3)
    box = browser.run(f"(b => [b.x, b.y, b.width, b.height])({element}.getBoundingClientRect())")
    return tuple(box)


def brush(browser: Browser) -> None:
    x, y, width, height = place(browser, ".st-key-chart_samples .marks")
    browser.drag((x + 0.3 * width, y + 0.2 * height), (x + 0.6 * width, y + 0.25 * height))


def turn(browser: Browser) -> None:
    x, y, width, height = place(browser, "[data-testid=stNumberInputStepDown]")
    browser.click(x + width / 2, y + height / 2)


def click_token(browser: Browser) -> None:
    x, y, _, _ = place(browser, "[class*=st-key-chart_text_a] .marks")
    browser.click(x + 90, y + 12)


def next_cycle(browser: Browser) -> None:
    """Tab to the first button that goes on, and press it: everything can be reached without a mouse."""
    for _ in range(80):
        browser.press("Tab")
        if browser.run("document.activeElement.tagName + document.activeElement.innerText").startswith("BUTTONnext cycle"):
            browser.press("Enter")
            return
    raise RuntimeError("80 presses of Tab do not reach 'next cycle'")


def settle(browser: Browser) -> float:
    """Wait until the script has run and has stayed so for a moment; seconds until it first had."""
    seconds = wait(lambda: browser.run(STATE) == "notRunning", "the page never finished")
    for _ in range(5):
        time.sleep(0.1)
        if browser.run(STATE) != "notRunning":
            return seconds + settle(browser)
    return seconds


def whole_page(browser: Browser, path: Path) -> None:
    """A picture of all of the page, not only of what fits the window."""
    for _ in range(2):  # charts follow the width, and the height follows the charts
        browser.resize(min(8000, max(browser.height, int(browser.run(HEIGHT)) + 20)))
        time.sleep(0.6)
    browser.picture(path)
    print(f"           {path}")


def start_server(port: int, words: list[str]) -> subprocess.Popen:
    command = [sys.executable, "-m", "streamlit", "run", str(ROOT / "app.py"), "--server.headless", "true"]
    command += ["--server.port", str(port), "--server.fileWatcherType", "none", "--", *words]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def up() -> bool:
        try:
            with urllib.request.urlopen(f"http://localhost:{port}/_stcore/health", timeout=1) as answer:
                return answer.status == 200
        except OSError:
            return False

    wait(up, "the dashboard's server did not start")
    return server


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


if __name__ == "__main__":
    run_command(main)
