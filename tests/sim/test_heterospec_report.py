"""The HeteroSpec report: its figures are the replays', and it says what it cannot know."""

from __future__ import annotations

import pytest

from benchmarks.heterospec import changes, figures, main
from policies.errors import UserError
from policies.registry import load_policy
from sim.replay import replay
from sim.setting import Setting
from sim.trial import run_trial
from tests.policies.synthetic import Language
from tests.sim.synthetic_recording import write
from tests.sim.test_bounds import COST, PLAN

SPEC = "heterospec(total_tokens=9, depth=2, top_k=3, alpha=1, minimum_samples=3)"


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return write(tmp_path_factory.mktemp("report") / "trace", Language(4), PLAN)


def test_figures_are_the_replays(recording):
    policy = load_policy("eagle3(total_tokens=9, depth=2, top_k=3)")
    sums, log = run_trial(recording, policy, Setting("made-up"), COST), replay(recording, policy)
    found = figures(sums)
    assert found["calls"] == len(log.sequence) and found["verified"] == int((log.kept + 1).sum())
    one = figures(sums, 1)
    mine = recording.domain_index[log.sequence.numpy()] == 1
    assert one["tau"] == pytest.approx(float(log.emitted[mine].sum()) / mine.sum())
    assert changes(found, {**found, "calls": found["calls"] * 1.5})[1] == "+50.0%"


def test_the_command(recording, tmp_path, monkeypatch, capsys):
    out = tmp_path / "report.md"
    monkeypatch.setattr("sys.argv", ["x", str(recording.folder), "--policy", SPEC, "--out", str(out)])
    main()
    text = out.read_text()
    for title in ("By domain", "Ablation", "alpha", "What the strata are fitted on", "Controls", "Verdict"):
        assert f"## {title}" in text
    assert "same-budget static" in text and "best static" not in text and "target calls per token" in text
    monkeypatch.setattr("sys.argv", ["x", str(recording.folder), "--policy", SPEC, "--temperature", "0"])
    main()
    told = capsys.readouterr().out.partition("written to")[2]
    tables, made = (page.split("## By domain")[1].split("Made by")[0] for page in (text, told)), "`python -m benchmarks.heterospec "
    assert "texts at temperature 0" in told and len(set(tables)) == 1
    assert f"Made by {made}{recording.folder} --policy" in text and "--temperature 0`" in told
    monkeypatch.setattr("sys.argv", ["x", str(recording.folder), "--policy", SPEC, "--temperature", "0.5"])
    with pytest.raises(UserError, match="it holds 0"):
        main()
    monkeypatch.setattr("sys.argv", ["x", str(recording.folder), "--policy", "eagle3"])
    with pytest.raises(UserError, match="is about heterospec"):
        main()
