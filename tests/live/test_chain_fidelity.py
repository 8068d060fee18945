"""Chain policies and online learners decode live as they replay: float64, every cycle, what they learned included."""

from __future__ import annotations

import pytest

from live.fidelity import check_policy
from policies.registry import load_policy
from traces.recording import open_recording

RULES = (
    "kangaroo(threshold=0.05)",
    "svip(threshold=0.7, most=12)",
    "survival(threshold=0.01)",
    "specdec_pp(threshold=0.9, weights_=(2.0, 0.2, -0.1, -0.1))",
    "expected_value(draft_share=0.1, weights_=(2.0, 0.2, -0.1, -0.1), next_=0.6)",
)
LEARNERS = (
    "adaedl(start=0.1, step=0.2)",
    "hf_heuristic(start=4, threshold=0.05)",
    "hf_confidence(threshold=0.05)",
    "gammatune",
    "online_acceptance(refit=8, warm_up=1, threshold=0.2)",
    "ucbspec(exploration=0.1, arms=(1, 3, (12, 3, 4), (30, 5, 10)))",
    "exp3spec(arms=(1, 3, (12, 3, 4)))",
    "hedgespec(arms=((6, 2, 4), (12, 3, 4), (20, 4, 4)))",
    "tapout(arms=('kangaroo(threshold=0.05)', 'svip(threshold=0.7)'))",
)


@pytest.mark.parametrize("spec", LEARNERS)
def test_learners(tiny_recording, pair64, spec):
    """Across several texts, so that a learner goes from one request to the next."""
    report = check_policy(open_recording(tiny_recording), pair64, load_policy(spec), "draft", 30)
    assert report.identical == report.cycles >= 30, report.notes


@pytest.mark.long
@pytest.mark.parametrize("drafter", ["eagle3", "draft"])
@pytest.mark.parametrize("spec", RULES + LEARNERS)
def test_rules_and_learners(tiny_recording, pair64, spec, drafter):
    report = check_policy(open_recording(tiny_recording), pair64, load_policy(spec), drafter, 200)
    assert report.identical == report.cycles, report.notes
