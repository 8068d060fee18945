"""Trials: many policies at once give what each gives alone, and each is replayed once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sim.trial
from policies.registry import load_policy
from sim.setting import Setting
from sim.trial import Trials, run_trial, run_trials
from tests.policies.synthetic import Language
from tests.sim.many_texts import PLAN, content
from tests.sim.synthetic_recording import write
from traces.costs import Profile
from traces.recording import Recording

GOODPUT = str(Path(sim.trial.__file__).parents[1] / "policies" / "fitted" / "goodput.json")
COST = Profile(content()).cost("made-up")
SPECS = [f"eagle3(total_tokens={total}, depth={depth}, top_k=3)" for depth in (3, 2) for total in (2, 4, 7, 12)]
SPECS += ["chain(k=2)", "adaedl(most=3)", "chain(k=4)"]


@pytest.fixture(scope="module", params=[0.0, 1.0], ids=["greedy", "sampled"])
def recording(request, tmp_path_factory) -> Recording:
    folder = tmp_path_factory.mktemp("trial") / "trace"
    return write(folder, Language(3, steps=5), PLAN, temperature=request.param)


@pytest.mark.parametrize("setting", [{}, {"batch": 3}, {"batch": 4, "ragged": "sum"}, {"execution": "pipelined"}], ids=str)
def test_many_at_once_are_each_alone(recording: Recording, setting: dict, monkeypatch):
    policies, circumstances = [load_policy(spec) for spec in SPECS], Setting("made-up", **setting)
    alone = [run_trial(recording, policy, circumstances, COST) for policy in policies]
    drafted, real = [], sim.trial.outlooks
    monkeypatch.setattr(sim.trial, "outlooks", lambda r, p, *a, **k: drafted.append(len(p)) or real(r, p, *a, **k))
    together = run_trials(recording, policies, circumstances, COST)
    assert drafted == [8], "the members of a family must share a replay, or the test proves nothing"
    assert [sums.to_json() for sums in together] == [sums.to_json() for sums in alone]
    assert len({sums.mean("tau") for sums in alone}) > 5
    assert alone[-1].coverage < 1


def test_some_texts_only(recording: Recording):
    policies, chosen = [load_policy(spec) for spec in SPECS[:4]], torch.tensor([8, 1, 4])
    together = run_trials(recording, policies, Setting("made-up"), COST, chosen)
    for policy, sums in zip(policies, together, strict=True):
        assert sums.to_json() == run_trial(recording, policy, Setting("made-up"), COST, chosen).to_json()
        assert sums.sequence.tolist() == [1, 4, 8]


@pytest.mark.parametrize("setting", [{}, {"batch": 3}, {"context_offset": 50}], ids=str)
def test_other_prices_change_times_and_no_decision(recording: Recording, setting: dict):
    """goodput drafts what pays by the one cost model, and is priced by the other."""
    plain = {"context": [0, 100], "batch": [1, 4], "ms": [[50.0, 95.0], [50.0, 95.0]]}
    slow = content()["draft"] | {"made-up": {"width": [1, 11], "context": [0], "batch": [1, 4], "ms": [[[40, 40]], [[60, 60]]]}}
    dear = Profile(content(draft=slow, plain=plain)).cost("made-up")
    policies, circumstances = [load_policy(GOODPUT), load_policy("chain(k=2)")], Setting("made-up", **setting)
    own, other = (run_trials(recording, policies, circumstances, cost) for cost in (COST, dear))
    mixed = run_trials(recording, policies, circumstances, COST, prices=dear)
    for place in range(2):
        assert mixed[place].sums["kept"].tolist() == own[place].sums["kept"].tolist()
        assert mixed[place].sums["plain_ms"].tolist() == other[place].sums["plain_ms"].tolist()
    assert mixed[1].to_json() == other[1].to_json()  # who does not ask decides alike
    assert own[0].sums["levels"].sum() > other[0].sums["levels"].sum()
    assert mixed[0].sums["ms"].sum() > max(own[0].sums["ms"].sum(), other[0].sums["ms"].sum())


def test_trials_are_remembered(recording: Recording, monkeypatch):
    asked, real = [], sim.trial.run_trials
    monkeypatch.setattr(sim.trial, "run_trials", lambda r, p, *rest: asked.append(len(p)) or real(r, p, *rest))
    trials = Trials(recording, Setting("made-up"), COST)
    one, other = load_policy("chain(k=2)"), load_policy("chain(k=4)")
    first = trials.tallies([one, other, one])
    assert trials.tally(other) is first[1] and first[0] is first[2] and asked == [2]
    assert trials.ms_per_token([one, other]) == [first[0].mean("ms_per_token"), float("inf")]  # chain(k=4) is not covered


def test_decisions_are_priced_by_policy(recording: Recording):
    """A policy that takes 3 ms a cycle to decide is 3 ms a cycle slower, and nobody else is."""
    dear = {"levels": [0], "batch": [1, 10], "ms": [[3.2, 3.2]]}
    free = {"levels": [0], "batch": [1, 10], "ms": [[0.2, 0.2]]}
    cheap, slow = (Profile(content(overhead={"eagle3": free} | more)).cost("made-up") for more in ({}, {"chain": dear}))
    policies = [load_policy("chain(k=2)"), load_policy(SPECS[0])]
    before, after = (run_trials(recording, policies, Setting("made-up"), cost) for cost in (cheap, slow))
    assert (after[0].sums["ms"] - before[0].sums["ms"]).tolist() == pytest.approx((3 * before[0].sums["cycles"]).tolist())
    assert after[1].to_json() == before[1].to_json()
