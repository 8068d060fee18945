"""The dashboard's logic, page by page, on a small made-up recording."""

from __future__ import annotations

import gc
import json
import re
import shutil
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest
import torch
from streamlit.testing.v1 import AppTest

import app
from dashboard import common, garbage, opening, thresholds, view
from policies.errors import UserError
from policies.registry import load_policy
from sim.glance import overview, policy_rows
from sim.metrics import replay_rows
from sim.setting import Setting
from sim.trial import run_trial
from tests.app_pages import APP, by_key, captions, errors, open_page, table_with
from tests.made_up_recording import write_profile, write_recording
from traces.costs import load_profile
from traces.recording import open_recording


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recording(tmp_path_factory.mktemp("recordings") / "trace", {"math": 6.0, "story": 3.0})


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AppTest]:
    return partial(open_page, monkeypatch)


@pytest.mark.parametrize("name", app.PAGES)
def test_every_page_opens_and_asks_its_question(recorded: Path, start, name: str):
    page = start(name, recorded)
    assert errors(page) == ""
    assert page.title[0].value == app.PAGES[name][0]
    assert re.fullmatch(r"\*.*\?( .*)?\*", page.markdown[0].value)


def test_what_a_page_has_loaded_is_not_searched_for_garbage_again(recorded: Path, start):
    garbage.set_aside.clear()
    gc.unfreeze()
    start("recording", recorded)
    assert gc.get_freeze_count() > len(gc.get_objects())


def test_every_table_is_there_for_the_taking():
    table = pl.DataFrame({"domain": ["math", "story"], "tau": [2.5, None]})
    assert pl.read_parquet(common.parquet_of(table)).equals(table)


def test_an_opening_is_shared_and_says_how_far_it_is(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(recorded, tmp_path / "new", ignore=shutil.ignore_patterns(".cache"))
    looked, begun, told = threading.Event(), [], threading.Event()

    def slowly(folder: str, on_shard: Callable[[int, int], None]):
        begun.append(folder)
        on_shard(1, 2)
        told.set()
        looked.wait(30)
        return open_recording(folder, on_shard=on_shard)

    monkeypatch.setattr(opening, "open_recording", slowly)
    known, lock = opening._openings()
    waiting = [threading.Thread(target=opening.opened, args=(str(tmp_path / "new"), ("a",))) for _ in range(2)]
    for thread in waiting:
        thread.start()
    assert told.wait(30)
    with lock:
        one = known[str(tmp_path / "new"), ("a",)]
    assert "1 of 2 shards read" in one.says()
    looked.set()
    for thread in waiting:
        thread.join(30)
    assert len(begun) == 1 and one.recording.result().complete and one.done == one.of
    assert opening.opened(str(tmp_path / "new"), ("a",)) is one.recording.result() and len(begun) == 1


def test_a_recording_that_could_not_be_opened_is_tried_again(recorded: Path, tmp_path: Path):
    shutil.copytree(recorded, tmp_path / "trace")
    whole = (tmp_path / "trace" / "nodes-00000.parquet").read_bytes()
    (tmp_path / "trace" / "nodes-00000.parquet").write_bytes(whole[:-1])
    with pytest.raises(UserError, match="truncated"):
        opening.opened(str(tmp_path / "trace"), ())
    (tmp_path / "trace" / "nodes-00000.parquet").write_bytes(whole)
    assert opening.opened(str(tmp_path / "trace"), ()).complete


def test_no_page_shows_its_own_comments():
    """Streamlit shows every bare string of a page that it runs."""
    import ast

    for path in (APP, *(APP.parent / "dashboard" / f"{name}.py" for name in app.PAGES)):
        bare = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)]
        assert len(bare) == 1, path  # the module's docstring is not shown


def test_recording_page(recorded: Path, start):
    page = start("recording", recorded)
    assert [metric.value for metric in page.metric][:3] == ["6", "108", "33.3%"]
    assert any("an \\*abacus\\*" in text.value for text in page.markdown)  # names are no Markdown
    assert len(table_with(page, "prompt")) == 6
    assert "Open text 4 " in start("recording", recorded, read="4").get("page_link")[0].proto.label  # as shared in an address
    by_key(page.selectbox, "domain").set_value("story").run()
    assert set(table_with(page, "prompt")["domain"]) == {"story"}
    by_key(page.text_input, "containing").set_value("no such words").run()
    assert errors(page) == "" and page.info[0].value == "No text matches."


def test_a_drag_moves_one_threshold_once(monkeypatch):
    """Behind it stands a fresh chart; what the replaced one still says is not listened to."""
    chart = SimpleNamespace(selection={"drag": {"entropy": [5.1, 7.3]}})
    state = {"chart_strata_0": chart, "t1": 3.0, "t2": 5.0, "t3": 9.0}
    monkeypatch.setattr(thresholds, "st", SimpleNamespace(session_state=state))
    for _ in range(2):
        thresholds.dragged()
        assert [state[name] for name in ("t1", "t2", "t3")] == [3.0, 7.3, 9.0] and thresholds.chart_key() == "chart_strata_1"


def test_thresholds_recompute_and_a_range_says_who_is_there(start):
    page = start("entropy", t1="9.0", t2="10.0", t3="11.0")  # the shipped recording: its trees are deep enough
    low = table_with(page, "stratum")
    assert low["up_to"].to_list()[:3] == [9.0, 10.0, 11.0] and low["positions"].sum() == pytest.approx(1)
    by_key(page.slider, "t1").set_value(10.5).run()
    moved = table_with(page, "stratum")
    assert errors(page) == "" and moved["up_to"].to_list()[:3] == [10.0, 10.5, 11.0]
    assert moved["positions"][0] > low["positions"][0]
    everything = next(text.value for text in page.markdown if "positions inside" in text.value)
    ends = by_key(page.slider, "range_draft_entropy").value
    by_key(page.slider, "range_draft_entropy").set_value((ends[0], sum(ends) / 2)).run()
    inside = next(text.value for text in page.markdown if "positions inside" in text.value)
    tokens = table_with(page, "draft says")
    assert errors(page) == "" and inside != everything
    assert 0 < len(tokens) < 105 and tokens["draft_entropy"].max() <= sum(ends) / 2 + 1e-3


def test_a_large_recording_is_looked_at_in_part_and_says_so(start, tmp_path: Path, monkeypatch):
    large = write_recording(tmp_path / "large", {"math": 6.0, "story": 3.0}, texts=5)
    monkeypatch.setattr(view, "MOST_REPLAYED", 50)
    page = start("lab", large, study="chain(k=2)", against="autoregressive")
    some = [0, 2, 5, 7]  # two of each domain
    sums = run_trial(open_recording(large), load_policy("chain(k=2)"), Setting("eagle3"), sequences=torch.tensor(some))
    assert errors(page) == "" and table_with(page, "policy")["tau"][0] == sums.mean("tau")
    assert "4 of 10 texts" in captions(page)
    by_key(page.sidebar.toggle, "every").set_value(True).run()
    whole = run_trial(open_recording(large), load_policy("chain(k=2)"), Setting("eagle3"))
    assert errors(page) == "" and table_with(page, "policy")["tau"][0] == whole.mean("tau") != sums.mean("tau")
    for name in ("entropy", "compare", "recording", "explorer"):
        page = start(name, large)
        assert errors(page) == "" and "4 of 10 texts" in captions(page)


def test_temperatures_are_told_apart(start, tmp_path: Path):
    mixed = write_recording(tmp_path / "mixed", {"math": 6.0, "story": 3.0}, texts=4, temperatures=(0.0, 1.0))
    page = start("entropy", mixed)
    assert errors(page) == "" and "By temperature of the text" in captions(page)
    cold = table_with(page, "draft says")
    by_key(page.sidebar.selectbox, "temperature").set_value(1.0).run()
    warm = table_with(page, "draft says")
    assert errors(page) == "" and set(cold["sequence"]) == {0, 2, 4, 6} and set(warm["sequence"]) == {1, 3, 5, 7}
    assert "By temperature" not in captions(start("entropy", write_recording(tmp_path / "plain", {"math": 6.0})))


def test_explorer_follows_cycles(recorded: Path, start):
    page = start("explorer", recorded, a="chain(k=2)", b="autoregressive")
    assert errors(page) == "" and by_key(page.number_input, "at").value == 0
    assert [metric.value for metric in page.metric[4:5]] == ["1.00"]  # plain decoding's tau
    by_key(page.button, "next cycle →b").click().run()
    assert by_key(page.number_input, "at").value == 1
    by_key(page.button, "next cycle →a").click().run()
    at = by_key(page.number_input, "at").value
    by_key(page.button, "← previous cycle" + "b").click().run()
    assert errors(page) == "" and by_key(page.number_input, "at").value == at - 1
    by_key(page.selectbox, "text").set_value("4 · story").run()
    assert errors(page) == "" and "4 · story" in by_key(page.selectbox, "text").value
    page = start("explorer", recorded, text="4 · story", at="5")  # as shared in an address
    assert (by_key(page.selectbox, "text").value, by_key(page.number_input, "at").value) == ("4 · story", 5)


def test_compare_policies_and_recordings(recorded: Path, start, tmp_path: Path):
    page = start("compare", recorded, a="chain(k=4)", b="autoregressive")
    table = table_with(page, "difference").set_index("domain")
    tau = {row.domain: row.tau for row in replay_rows(open_recording(recorded), load_policy("chain(k=4)"))}
    assert errors(page) == "" and table["difference"].to_dict() == pytest.approx({name: each - 1 for name, each in tau.items()})
    other = write_recording(tmp_path / "other", {"math": 6.0, "story": 3.0}, depth=3)
    page = start("compare", recorded, other, way="two recordings", both="chain(k=2)")
    assert errors(page) == "" and "6 texts have a partner" in captions(page)
    assert table_with(page, "difference")["difference"].abs().max() == 0  # the same texts, the same first levels


def test_pareto_shows_the_front_and_opens_the_lab(recorded: Path, start, tmp_path: Path, monkeypatch):
    assert "python -m sim.sweep" in start("pareto", recorded).info[0].value
    recording, cost = open_recording(recorded), load_profile(write_profile(tmp_path / "p.json")).cost("eagle3")
    swept = [policy_rows(recording, load_policy(f"chain(k={k})"), "eagle3", cost) for k in (1, 2, 3, 4)]
    pl.concat(swept).write_parquet(tmp_path / "swept.parquet")
    (tmp_path / "sweep").mkdir()
    pl.concat(swept).write_parquet(tmp_path / "sweep" / "results.parquet")
    named = start("pareto", recorded, "--sweep", tmp_path / "sweep")
    monkeypatch.chdir(tmp_path)
    for found in (named, start("pareto", recorded)):  # the second finds it in the folder that it was started in
        assert errors(found) == "" and len(table_with(found, "setting")) >= 1
    both = start("pareto", recorded, "--sweep", tmp_path / "sweep" / "results.parquet")
    assert by_key(both.selectbox, "sweep").options == ["sweep"]  # once, as one types it here
    page = start("pareto", recorded, "--sweep", tmp_path / "swept.parquet")
    front = table_with(page, "setting")
    assert errors(page) == "" and len(front) >= 1 and front["kept"].is_monotonic_increasing
    assert front["tau"].is_monotonic_increasing  # more is verified only where more is emitted
    by_key(page.selectbox, "up").set_value("ms_per_token").run()
    assert errors(page) == "" and table_with(page, "setting")["ms_per_token"].is_monotonic_decreasing
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    assert "cannot be read" in errors(start("pareto", recorded, "--sweep", tmp_path / "broken.parquet"))
    page = start("pareto", recorded, "--sweep", tmp_path / "swept.parquet", picked=front["setting"][0])
    assert errors(page) == "" and by_key(page.selectbox, "picked").value == front["setting"][0]
    assert any("in the lab" in link.proto.label for link in page.get("page_link"))
    monkeypatch.chdir(recorded)
    assert "outside the folder" in errors(start("pareto", recorded, sweep=str(tmp_path / "swept.parquet")))
    assert errors(start("pareto", recorded, "--anywhere", sweep=str(tmp_path / "swept.parquet"))) == ""


def test_cost_page(recorded: Path, start, tmp_path: Path):
    page = start("cost", recorded)
    assert ["traces.profile" in page.info[0].value, "live.bench" in page.info[1].value] == [True, True]
    measured = {"chain": [{"text": 0, "domain": "math", "tokens": 10, "cycles": 4, "ms": ms} for ms in (30.0, 20.0, 100.0)]}
    bench = {"predicted": [{"policy": "chain", "domain": "mean", "ms_per_token": 2.5}], "measured": measured}
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    page = start("cost", recorded, "--profile", write_profile(tmp_path / "p.json"), "--bench", tmp_path / "bench.json")
    assert errors(page) == "" and table_with(page, "measured_ms").iloc[0].to_list() == ["chain", 2.5, 5.0, 1]
    assert "looked_up" not in by_key(page.selectbox, "part").options
    profile = json.loads((tmp_path / "p.json").read_text())
    profile["looked_up"] = {"chain": profile["overhead"]["eagle3"] | {"levels": [1, 10]}}
    (tmp_path / "looking.json").write_text(json.dumps(profile))
    page = start("cost", recorded, "--profile", tmp_path / "looking.json", part="looked_up")
    assert errors(page) == "" and by_key(page.selectbox, "owner_looked_up").options == ["chain"]
    (tmp_path / "bench.json").write_text("{}")
    assert "is no bench" in errors(start("cost", recorded, "--bench", tmp_path / "bench.json"))


def damaged(folder: Path) -> None:
    shard = folder / "positions-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-7])


def newer(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 2}))


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [(damaged, "truncated"), (newer, "newer than version 1"), (emptied, "holds no recording")],
)
def test_bad_recordings_get_a_sentence_and_the_others_open(recorded: Path, start, tmp_path: Path, spoil, message):
    bad = tmp_path / "bad"
    shutil.copytree(recorded, bad)
    spoil(bad)
    page = start("recording", bad, recorded)
    assert message in errors(page)
    page.sidebar.selectbox[0].set_value(str(recorded)).run()
    assert errors(page) == "" and page.metric[0].value == "6"


def test_without_a_recording_the_page_says_what_to_run(start, tmp_path: Path):
    script = tmp_path / "app.py"  # alone in a folder with its pages: no shipped sample beside it
    shutil.copy(APP, script)
    shutil.copytree(APP.parent / "dashboard", tmp_path / "dashboard")
    page = start("recording", script=script)
    assert errors(page) == "" and "python -m traces.record" in page.info[0].value
    assert "unknown option --nope" in errors(start("recording", "--nope", script=script))


def test_policy_files_stay_inside_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for spec in ("../evil.py:Mine", "../evil.py:Mine(k=2)", "/tmp/fitted.json", "a.json x/../../evil.py:Mine"):
        with pytest.raises(UserError, match="outside the folder"):
            common.inside(spec)
    for spec in ("mine.py:Mine", "fits/mine.json", "fits/mine.json(depth=3)", "eagle3(depth=3)"):
        common.inside(spec)


def test_overview(recorded: Path):
    table = overview(open_recording(recorded))
    assert table.rows() == [
        ("math", 3, 36, 54, pytest.approx(1 / 3), pytest.approx(1 / 3)),
        ("story", 3, 36, 54, pytest.approx(1 / 3), pytest.approx(1 / 3)),
        ("all", 6, 72, 108, pytest.approx(1 / 3), pytest.approx(1 / 3)),
    ]
