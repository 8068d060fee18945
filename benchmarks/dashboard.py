"""The dashboard in a real browser: ``python -m benchmarks.dashboard [TRACE ...]``.

Opens every page, clicks through the main flow, looks for exception boxes, error messages and console errors, times first
paint and interactions, and writes pictures. ``--repeat 100000`` first makes a recording of so many positions out of the
given one; ``--readme`` writes small pictures to docs/ instead. Exits 1 when something was wrong. Needs a Chromium (apt-get
install chromium).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks.browser import Browser, compact, wait
from benchmarks.flow import main_flow
from benchmarks.repeated import repeat
from benchmarks.served import TITLE, App, drawn, opened, settle, troubles
from policies.errors import run_command
from traces.manifest import NAME

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "traces" / "samples" / "reference"
README = {  # what the README shows: page, query and height in pixels
    "lab": ("study=eagle3(total_tokens=24, depth=5)", 1080),
    "explorer": ("at=3", 1640),  # down to the trees
    "entropy": ("", 820),
}
LARGEST = 150_000
"""Bytes of a picture for the README."""
FLOW = "flow"
PAGES = ("recording", "entropy", "lab", "explorer", "compare", "pareto", "cost")
SCROLLED = "document.querySelectorAll('[data-testid=stMain], [data-testid=stSidebarContent]')"
HEIGHT = f"Math.max(...[...{SCROLLED}].map(e => e.scrollHeight))"


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.dashboard", description=__doc__.split("\n")[0])
    parse.add_argument("arguments", nargs="*", metavar="TRACE", help="what the app is opened with (default: nothing)")
    parse.add_argument("--option", action="append", default=[], metavar="WORD", help="further words for the app")
    parse.add_argument("--out", type=Path, default=Path("build/dashboard"), help="where pictures go")
    parse.add_argument("--page", action="append", default=[], choices=[*PAGES, FLOW], help="may be repeated (default: all)")
    parse.add_argument("--query", default="", help="query parameters for every page, for example 'recording=mine'")
    parse.add_argument("--repeat", type=int, metavar="N", help="repeat the first TRACE's texts until they hold N positions")
    parse.add_argument("--readme", action="store_true", help="write compact pictures to docs/ and do nothing else")
    parse.add_argument("--dark", action="store_true", help="take pictures in the dark theme too")
    return parse


def main(arguments: list[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    if args.repeat:
        first = Path(args.arguments[0]) if args.arguments else SAMPLE
        large = args.out / f"{first.name}-repeated-{args.repeat}"
        if not (large / NAME).exists():
            repeat(first, large, args.repeat)
        args.arguments = [str(large), *args.arguments[1:]]
    app = App([*args.arguments, *args.option])
    try:
        browser = Browser()
        try:
            wrong = browse(browser, app, args)
        finally:
            browser.close()
    finally:
        app.close()
    print("\n".join(wrong) if wrong else "no exception box, no error message, no console error")
    if wrong:
        sys.exit(1)


def browse(browser: Browser, app: App, args: argparse.Namespace) -> list[str]:
    """Do what was asked for; what was wrong."""
    if args.readme:
        return for_readme(browser, app)
    wrong = []
    for page in args.page or [*PAGES, FLOW]:
        found = main_flow(browser, app, args.query, args.out) if page == FLOW else visit(browser, app, page, args)
        wrong += [f"{page}: {trouble}" for trouble in found]
    return wrong


def visit(browser: Browser, app: App, page: str, args: argparse.Namespace) -> list[str]:
    """Open one page twice (the second opening finds everything remembered) and picture it; what was wrong with it."""
    told = []
    for when in ("first time", "again"):
        browser.resize(browser.height)
        browser.go("about:blank")
        started, before = time.perf_counter(), app.computed()
        browser.go(app.address(page, args.query))
        wait(lambda: browser.run(TITLE), f"{page} did not appear")
        painted = time.perf_counter() - started
        settle(browser)
        complete, computing = time.perf_counter() - started, app.computed() - before
        told.append(f"{when}: paint {painted:.1f} s, complete {complete:.1f} s, server computed {computing:.2f} s")
    print(f"{page:10} {'; '.join(told)}", flush=True)
    for theme in ("light", "dark") if args.dark else ("light",):
        browser.theme(theme)
        whole_page(browser, args.out / f"{page}-{theme}.png")
    browser.theme("light")
    return troubles(browser)


def for_readme(browser: Browser, app: App) -> list[str]:
    """The pages that the README shows, as much of each as fits the window."""
    wrong = []
    for page, (query, height) in README.items():
        browser.resize(height)
        browser.go(app.address(page, query))
        opened(browser, page)
        path = ROOT / "docs" / f"dashboard-{page}.png"
        browser.picture(path)
        size = compact(path, LARGEST)
        print(f"{path} ({size / 1000:.0f} kB)")
        wrong += [f"{path} is larger than {LARGEST / 1000:.0f} kB"] if size > LARGEST else []
        wrong += troubles(browser)
    return wrong


def whole_page(browser: Browser, path: Path) -> None:
    """A picture of all of the page, not only of what fits the window."""
    drawn(browser)
    for _ in range(2):  # charts follow the width, and the height follows the charts
        browser.resize(min(8000, max(browser.height, int(browser.run(HEIGHT)) + 20)))
        time.sleep(0.6)
    browser.picture(path)
    print(f"           {path}")


if __name__ == "__main__":
    run_command(main)
