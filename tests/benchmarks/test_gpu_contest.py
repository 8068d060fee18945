"""The contest on the tiny pair in float64: everyone decodes the recorded texts, in exactly the cycles that replay predicts."""

from __future__ import annotations

import pytest

from benchmarks.gpu import contest
from benchmarks.gpu.contest_live import across_domains, capacity_for, decode_live
from benchmarks.gpu.contest_tables import bars, contest_section, live_table, tau_of
from benchmarks.gpu.setting import Setting
from live.graphed_pair import graphed
from policies.errors import UserError
from policies.registry import load_policy
from sim.static_search import DEPTHS, TOP_KS
from traces.analytic import analytic_profile
from traces.recording import open_recording

SPECS = ("chain(k=3)", "eagle3(total_tokens=9, depth=3, top_k=4)")


@pytest.fixture(scope="module")
def recording(tiny_pair, tmp_path_factory):
    """Two short texts of each domain in float64, with what the two policies draft."""
    from traces.record import main

    folder = tmp_path_factory.mktemp("contest") / "trace"
    cover = ["--cover", "eagle3(top_k=4, depth=3)", "--cover", "chain(k=3)"]
    main(tiny_pair.record(folder, "--dtype", "float64", *cover, "--limit", "2", "--max-new-tokens", "10"))
    return open_recording(folder)


def test_the_contest_records_what_its_policies_draft():
    """To the deepest level that each may go to, at its own width: one node missing, and it can neither be fitted nor priced."""
    beams = {policy.top_k: policy.depth for policy in map(load_policy, contest.COVER) if policy.name == "eagle3"}
    for spec in (*contest.OPPONENTS, contest.FITTED["goodput"]):
        policy = load_policy(spec)
        assert policy.name == "chain" or policy.depth <= beams[getattr(policy, "top_k", 10)], spec
    hetero = load_policy(contest.FITTED["heterospec"])
    assert hetero.depth + -(-hetero.depth // 2) <= beams[hetero.top_k]
    assert all(beams[width] >= max(DEPTHS) for width in TOP_KS)


def test_a_policy_that_cannot_be_fitted_costs_no_other_its_place(recording, tmp_path, monkeypatch):
    setting = Setting("cpu", tmp_path, rehearse=True)
    setting.work.mkdir()
    monkeypatch.setattr(contest, "opened", lambda _: recording)
    monkeypatch.setattr(contest, "cost_of", lambda *_: analytic_profile("h100", "llama-3.1-8b").cost("eagle3"))
    monkeypatch.setitem(contest.TOY_FITTED, "heterospec", "heterospec(total_tokens=6, depth=2, top_k=4, minimum_samples=100000)")
    found = contest.fitted(setting)
    assert set(found["policies"]) == {"best static", "goodput"} and "minimum_samples" in found["failed"]["heterospec"]
    assert {"best static", "goodput"} <= contest.entrants(setting).keys() and "heterospec" not in contest.entrants(setting)
    assert "heterospec" in contest_section({"fitted": found})[0]
    monkeypatch.setattr(contest, "learned", None)  # what was found is not searched for again
    assert contest.fitted(setting)["policies"] == found["policies"]


@pytest.mark.parametrize("batch", [1, 2])
def test_everyone_takes_the_predicted_cycles(pair64, recording, batch):
    texts = across_domains(recording, [text for text in range(len(recording.length)) if recording.length[text] > 1])
    assert recording.domain_index[texts[0]] != recording.domain_index[texts[1]]
    cost = analytic_profile("h100", "llama-3.1-8b").cost("eagle3")
    policies = {spec: load_policy(spec) for spec in SPECS}
    fixed = graphed(pair64, capacity_for(recording))
    found = decode_live(fixed, policies, recording, cost, texts, batch, (2, 1), 60.0, ordinary=pair64)
    assert len(found["groups"]) == 2 and found["rounds"] == 1
    said = {entry["tokens"] for entry in found["measured"] if entry["group"] == 0}
    assert len(said) == 1  # the text is the target's own, whoever drafts
    for spec in SPECS:
        assert tau_of(found, spec) == pytest.approx(found["predicted"][spec]["tau"], abs=1e-4)
        assert found["predicted"][spec]["coverage"] == 1
    everyone = {*SPECS, "plain"}
    assert {entry["contender"] for entry in found["measured"]} == everyone | {f"{name}, no graphs" for name in everyone}
    assert "times plain" in live_table(found) and "prediction of eagle3" in bars(found)[0]


def test_too_few_texts_are_no_batch(pair64, recording):
    with pytest.raises(UserError, match="make no batch"):  # so that the job is not taken for done
        decode_live(pair64, {}, recording, None, [0], 2, (1, 1), 1.0)
