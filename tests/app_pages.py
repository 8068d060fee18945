"""Pages of the dashboard under Streamlit's AppTest, and what can be read off them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

import app
from dashboard import common

APP = Path(app.__file__)
_drawn_to_dict = common.Drawn.to_dict


def _validated(drawn: common.Drawn) -> dict:
    """What the page is sent, once the chart was found to be valid Vega-Lite."""
    drawn.chart.to_dict(validate=True)
    return _drawn_to_dict(drawn)


def open_page(monkeypatch: pytest.MonkeyPatch, page: str, *arguments: object, script: Path = APP, **query: str) -> AppTest:
    """Open a page with command line arguments and query parameters. Its charts must be valid Vega-Lite."""
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
    monkeypatch.setattr(common.Drawn, "to_dict", _validated)
    tested = AppTest.from_file(str(script), default_timeout=600).run()
    if page != "recording":
        tested.switch_page(f"dashboard/{page}.py")
    for name, value in query.items():
        tested.query_params[name] = value
    return tested.run()


def errors(page: AppTest) -> str:
    assert not page.exception, page.exception[0].message
    return "\n".join(error.value for error in page.error)


def captions(page: AppTest) -> str:
    return "\n".join(caption.value for caption in page.caption)


def by_key(elements, key: str):
    return next(element for element in elements if element.key == key)


def table_with(page: AppTest, column: str):
    return next(frame.value for frame in page.dataframe if column in frame.value.columns)
