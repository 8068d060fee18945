"""A report of every kind of result: complete, self-contained, and refused where it cannot be made."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from sim.report import main
from tests.sim.many_texts import write_many, write_profile
from tests.sim.test_validate import bench


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """JSON files of all five commands, by name."""
    from sim import acceptance, compare, contest, sweep, validate

    folder = tmp_path_factory.mktemp("report")
    trace, profile = write_many(folder / "trace"), str(write_profile(folder / "p.json"))
    files = {name: folder / f"{name}.json" for name in ("replay", "sweep", "curves", "compare", "validate")}
    policy = ["--policy", "eagle3(total_tokens=8, depth=3, top_k=3)", "--resamples", "100"]
    wide = ["--policy", "chain(k=9)"]  # more than the recording covers
    contest.main([str(trace), *policy, *wide, "--profile", profile, "--json", str(files["replay"])])
    grid = ["--grid", "depth=1,2", "--out", str(folder / "s"), "--profile", profile]
    sweep.main([str(trace), *policy[:1], "eagle3(top_k=3)", *policy[2:], *grid, "--json", str(files["sweep"])])
    acceptance.main([str(trace), "--policy", "chain(k=2)", "--by", "domain", "--json", str(files["curves"])])
    compare.main([str(trace), str(trace), *policy, "--json", str(files["compare"])])
    validate.main([str(bench(trace, folder)), "--json", str(files["validate"])])
    return files


class _Links(HTMLParser):
    """Everything that a browser would load from elsewhere."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.charts = 0

    def handle_starttag(self, tag, attrs):
        self.charts += tag == "svg"
        self.found += [value for name, value in attrs if name in ("src", "href") and value and not value.startswith("#")]
        self.found += ["script"] * (tag in ("script", "link"))


def test_a_page_of_everything(results, tmp_path):
    pytest.importorskip("vl_convert")
    main([*map(str, results.values()), "--out", str(tmp_path / "r")])
    page, text = (tmp_path / "r.html").read_text(), (tmp_path / "r.md").read_text()
    parsed = _Links()
    parsed.feed(page)
    assert not parsed.found and parsed.charts == 2 + 1 + 4 + 1
    for path in results.values():
        content = json.loads(path.read_text())
        about = content["about"][0] if isinstance(content["about"], list) else content["about"]
        assert about["manifest_sha256"] in page and about["manifest_sha256"] in text
        assert content["command"] in text
    row = json.loads(results["replay"].read_text())["rows"][0]
    assert f"{row['tau']:.2f}" in page and 'class="missed"' in page and "chain(k=9)" in page
    assert text.count("\n## ") == 5 and re.search(r"\| policy \| tau \|", text)


def test_without_the_library_for_charts(results, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vl_convert", None)
    told = refused(lambda: main([str(results["replay"]), "--out", str(tmp_path / "r")]))
    assert "pip install 'specreplay[app]'" in told and not list(tmp_path.iterdir())


def test_the_markdown_of_everything(results):
    """What a machine without the library for charts can test."""
    from sim.report import as_markdown
    from sim.sections import section_of

    sections = [section_of(json.loads(path.read_text())) for path in results.values()]
    assert [section.title for section in sections] == [
        "Who wins", "A sweep", "Entropy and acceptance", "Two recordings", "Prediction against measurement",
    ]  # fmt: skip
    text = as_markdown("Title", sections)
    assert all(json.loads(path.read_text())["command"] in text for path in results.values())
    assert sum(len(section.charts) for section in sections) == 2 + 1 + 4 + 1


def test_results_from_before_there_was_a_schedule(results):
    from sim.sections import section_of

    for path in results.values():
        content = json.loads(path.read_text())
        now = section_of(content)
        settings = content.get("settings", [content["setting"]] if "setting" in content else [])
        for held in (*settings, *content.get("rows", [])):
            held.pop("schedule", None)
        before = section_of(content)
        assert (before.title, before.tables) == (now.title, now.tables)
        assert bool(settings) == any("schedule" in cell for row in now.facts.rows for cell in row)


def test_refusals(results, tmp_path, refused):
    assert "cannot be read" in refused(lambda: main([str(tmp_path / "none.json"), "--out", str(tmp_path / "r")]))
    (tmp_path / "x.json").write_text('{"a": 1}')
    assert "is no result of a sim command" in refused(lambda: main([str(tmp_path / "x.json"), "--out", str(tmp_path / "r")]))
    assert "cannot write" in refused(lambda: main([str(results["replay"]), "--out", str(tmp_path / "no" / "r")]))
