"""The published tree policies decide live as in replay: every cycle identical in float64."""

from __future__ import annotations

import pytest

from live.fidelity import check_policy, main
from policies.registry import load_policy
from sim.replay import replay
from traces.recording import open_recording

TREES = (
    "opt_tree(threshold=0.02)",
    "ddd(depth=6, checks=(1, 2, 3), threshold=-2.5)",
    "talon(total_tokens=24, mu=0.3, depth=4)",
    "dyspec(nodes=24, depth=8)",
    "c2t(top_k=6, depth=4, width=6, units_=((60.0, -0.1, -0.3, 0.5), (9.0, 0.02, 0.1, -0.2)), output_=(0.6, 1.0, -1.0))",
    "sequoia(acceptance_=(0.3, 0.1, 0.05), tree_=((0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (0, 0, 0)))",
)


@pytest.mark.parametrize("drafter", ["eagle3", "draft"])
@pytest.mark.parametrize("spec", TREES)
def test_float64_is_the_proof(tiny_recording, pair64, spec, drafter):
    report = check_policy(open_recording(tiny_recording), pair64, load_policy(spec), drafter, 24)
    assert report.identical == report.cycles >= 24 and not report.notes
    assert report.largest < 1e-5


@pytest.mark.parametrize("spec", TREES)
def test_the_settings_are_not_idle(tiny_recording, spec):
    """Some trees differ in size or depth from others, or the fixed one has its size; and all are recorded."""
    log = replay(open_recording(tiny_recording), load_policy(spec), "eagle3")
    assert log.coverage == 1.0 and int(log.kept.max()) > 5
    shapes = set(zip(log.kept.tolist(), log.levels.tolist(), strict=True))
    assert len(shapes) > 1 or spec.startswith("sequoia")


def test_what_was_not_recorded_is_said_and_neither_proven_nor_broken(tiny_recording, pair64, capsys):
    """Deeper than the recording: the cycles that it covers are compared, the others counted."""
    deep = "eagle3(total_tokens=30, depth=9, top_k=6)"
    report = check_policy(open_recording(tiny_recording), pair64, load_policy(deep), "eagle3", 24)
    assert report.lacking > 0 and report.identical + report.lacking == report.cycles >= 24 and not report.notes
    options = ["--cycles", "24", "--drafter", "eagle3", "--skip-generate", "--witness", "0"]
    assert main([str(tiny_recording), "--policy", "chain(k=2)", "--policy", deep, *options]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("  ok") and lines[1].endswith(f"{report.lacking} not recorded")
    assert lines[2].endswith(f"python -m traces.record --fill {tiny_recording} --policy '{deep}'") and "BROKEN" not in lines[2]
