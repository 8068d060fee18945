"""What a reader of the dashboard does first, with mouse and keyboard, timed step by step."""

from __future__ import annotations

import re
import time
from pathlib import Path

from benchmarks.browser import Browser, wait
from benchmarks.served import STATE, App, opened, settle, troubles

MARK, RULE = (0, 114, 178), (213, 94, 0)
"""Colours of `sim.charts.PALETTE`: of the first points, and of thresholds."""


def main_flow(browser: Browser, app: App, query: str, pictures: Path) -> list[str]:
    """What a reader does first, with mouse and keyboard: each step timed from the input to the finished page.

    The address says that a step was taken: what a person chose stands in it.
    """
    steps = {
        "click a point of a curve": ("entropy", click_curve, "range_draft_entropy="),
        "brush a range of entropies": ("entropy", brush, "range_draft_entropy="),
        "drag a threshold": ("entropy", drag_threshold, "[?&]t[123]="),
        "turn a parameter of the policy": ("lab", turn, "study="),
        "click a token": ("explorer", click_token, "at="),
        "go on by keyboard": ("explorer", next_cycle, "at="),
        "click a setting of the sweep": ("pareto", click_setting, "picked="),
        "open it in the lab": (None, open_in_lab, "study="),
    }
    wrong = []
    for name, (page, act, mark) in steps.items():
        if page:
            browser.resize(browser.height)
            browser.go(app.address(page, query))
            opened(browser, page)
        before = app.computed()
        try:
            if act(browser) is False:
                print(f"{name}: there is no sweep (--option --sweep --option FILE)")
                break
            started = time.perf_counter()
            wait(lambda mark=mark: re.search(mark, browser.run("location.search")), f"{name}: the address did not change", 90)
            wait(lambda: browser.run(STATE) == "notRunning", f"{name}: the page never finished")
            print(f"{name}: {time.perf_counter() - started:.2f} s; {app.computed() - before:.2f} s of the server computing")
        except RuntimeError as error:
            wrong.append(str(error))
        settle(browser)
        browser.picture(pictures / f"flow-{name.replace(' ', '-')}.png")
        wrong += troubles(browser)
    return wrong


def place(browser: Browser, selector: str, number: int = 0) -> tuple[float, float, float, float]:
    """Left, top, width and height of an element, scrolled into view."""
    element = f"document.querySelectorAll({selector!r})[{number}]"
    wait(lambda: browser.run(f"!!{element}"), f"{selector} did not appear")
    browser.run(f"{element}.scrollIntoView({{block: 'center'}})")
    time.sleep(0.3)
    box = browser.run(f"(b => [b.x, b.y, b.width, b.height])({element}.getBoundingClientRect())")
    return tuple(box)


def brush(browser: Browser) -> None:
    x, y, width, height = place(browser, ".st-key-chart_samples .marks")
    browser.drag((x + 0.3 * width, y + 0.2 * height), (x + 0.6 * width, y + 0.25 * height))


def click_curve(browser: Browser) -> None:
    _click_colour(browser, ".st-key-chart_acceptance_by_domain .marks")


def drag_threshold(browser: Browser) -> None:
    """From a threshold's rule (its colour tells it) one fifteenth of the chart to the left."""
    left, top, width, height = place(browser, "[class*=st-key-chart_strata_] .marks")
    x, y = found_colour(browser, "[class*=st-key-chart_strata_] .marks", RULE)
    browser.drag((x, y), (x - width / 15, y))


def click_setting(browser: Browser) -> bool | None:
    """A setting of the front; False where there is no sweep to show."""
    shown = "document.querySelector('.st-key-chart_pareto .marks')"
    wait(lambda: browser.run(f"!!({shown} || document.querySelector('[data-testid=stAlert]'))"), "the sweep did not appear")
    if not browser.run(f"!!{shown}"):
        return False
    return _click_colour(browser, ".st-key-chart_pareto .marks")


def _click_colour(browser: Browser, chart: str) -> None:
    browser.click(*found_colour(browser, chart, MARK))


def found_colour(browser: Browser, chart: str, colour: tuple[int, int, int]) -> tuple[float, float]:
    """Where on the page a chart shows the colour: the middle of the largest blob's rows, as good as in the middle of a mark."""
    left, top, width, height = place(browser, chart)
    picture = browser.pixels()
    height = 0.6 * height  # what lies below is the legend
    box = picture[int(top) : int(top + height), int(left) : int(left + width)].astype(int)
    hit = (abs(box - colour) < 12).all(axis=2)
    if not hit.any():
        raise RuntimeError(f"{chart} shows nothing in the colour {colour}")
    thick = hit[1:-1, 1:-1] & hit[:-2, 1:-1] & hit[2:, 1:-1]  # not a thin line's
    best = thick & hit[1:-1, :-2] & hit[1:-1, 2:]
    rows, columns = (best if best.any() else thick if thick.any() else hit).nonzero()
    middle = len(rows) // 2
    return left + float(columns[middle]) + 1, top + float(rows[middle]) + 1


def open_in_lab(browser: Browser) -> None:
    links = "[...document.querySelectorAll('[data-testid=stMain] a')]"
    wait(lambda: browser.run(f"{links}.some(a => a.innerText.includes('in the lab'))"), "no link to the lab appeared")
    browser.run(f"{links}.find(a => a.innerText.includes('in the lab')).click()")


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
