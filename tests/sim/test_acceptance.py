"""Ranks, terminal confidence, AUC and the command, against the hand-written forest and brute force."""

from __future__ import annotations

import json
import math

import numpy as np
import polars as pl
import pytest

from policies.registry import load_policy
from sim.acceptance import certainty, main, rank_by_depth, terminal_ranks
from sim.calibration import area_under_curve
from sim.curves import samples
from tests.sim.by_hand import write_by_hand
from tests.sim.many_texts import write_many
from traces.recording import open_recording


@pytest.fixture(scope="module")
def hand(tmp_path_factory):
    return open_recording(write_by_hand(tmp_path_factory.mktemp("hand") / "trace"))


def test_sums_along_the_path(hand):
    table = samples(hand)
    rows = table.select("sequence", "position", "depth", "path_entropy", "path_score").rows()
    found = {(s, p, d): (e, score) for s, p, d, e, score in rows}

    def entropy(*logprobs: float) -> float:
        share = np.exp(logprobs) / np.exp(logprobs).sum()
        return float(-(share * np.log(share)).sum())

    assert found[0, 0, 0] == pytest.approx((entropy(-0.1, -2.5), -0.1))
    # below 11 (-0.1) the draft's first choice is 21 (-0.2)
    assert found[0, 0, 1] == pytest.approx((entropy(-0.1, -2.5) + entropy(-0.2, -1.8), -0.3))
    # text 0 at 11: 12 is the second choice (-0.9), below it 13 the first (-0.4)
    assert found[0, 1, 1] == pytest.approx((entropy(-0.7, -0.9) + entropy(-0.4, -1.5), -1.3))


def test_ranks_by_depth(hand):
    everything, first, second = rank_by_depth(hand, "hand")
    # children of roots: 11 first, 12 second, 13 first, 41 first, END first; of depth 1 (that count): 12 second of two behind
    # text 0 at 10, 13 first at 11, END first at 40
    assert (first["depth"], first["count"], first["shares"]) == (1, 5, [0.8, 0.2])
    assert second["depth"] == 2 and second["count"] == 3 and second["shares"] == pytest.approx([2 / 3, 1 / 3])
    assert everything["count"] == 8 and everything["shares"] == pytest.approx([6 / 8, 2 / 8])


def test_terminal_rank_of_a_chain(hand):
    # chain of two: cycles accept 1, 2 and 2 of their nodes (see test_replay); the last accepted is first, second, second
    found = terminal_ranks(hand, load_policy("chain(k=2)"), "hand")
    assert found["counts"] == [1, 2] and found["nothing"] == 0 and found["kept"] == 2
    assert found["top_quarter"] == pytest.approx(1 / 3)


def test_terminal_ranks_hold_every_accepting_cycle(tmp_path):
    from sim.replay import replay

    recording = open_recording(write_many(tmp_path / "trace"))
    policy = load_policy("eagle3(total_tokens=8, depth=3, top_k=3)")
    found, log = terminal_ranks(recording, policy, "made-up"), replay(recording, policy)
    assert sum(found["counts"]) == int((log.accepted > 0).sum()) and found["nothing"] == int((log.accepted == 0).sum())
    assert len(found["counts"]) <= 7  # a rank among seven kept nodes


def test_auc_by_counting():
    score, hit = np.array([1.0, 2.0, 2.0, 3.0]), np.array([False, True, False, True])
    assert area_under_curve(score, hit) == (1 + 0.5 + 1 + 1) / 4
    assert area_under_curve(score, np.ones(4, bool)) is None


def test_reliability_of_a_calibrated_draft():
    rng = np.random.default_rng(0)
    probability = rng.uniform(0.05, 0.95, 20000)
    hit = rng.random(20000) < probability
    zeros = np.zeros(20000)
    columns = {"draft_entropy": -probability, "target_entropy": zeros, "path_entropy": zeros, "path_score": zeros}
    table = pl.DataFrame(columns | {"top1_logprob": np.log(probability), "top1": hit, "topk": hit})
    row = next(row for row in certainty(table) if row["measure"] == "top1_logprob")
    assert row["calibration_error"] < 0.02 and row["brier"] == pytest.approx(np.mean(probability * (1 - probability)), abs=0.01)
    by_measure = {row["measure"]: row["auc"] for row in certainty(table)}
    assert by_measure["draft_entropy"] == pytest.approx(by_measure["top1_logprob"]) and by_measure["path_score"] == 0.5
    sure = table.with_columns(top1_logprob=pl.Series(np.full(20000, math.log(0.99))))
    overconfident = next(row for row in certainty(sure) if row["measure"] == "top1_logprob")
    assert overconfident["calibration_error"] == pytest.approx(0.49, abs=0.02)


def test_the_command(tmp_path, capsys):
    trace = write_many(tmp_path / "trace")
    main([str(trace), "--by", "domain", "--bins", "1", "--policy", "chain(k=2)", "--json", str(tmp_path / "c.json")])
    content = json.loads((tmp_path / "c.json").read_text())
    assert set(content["curves"]) == {"draft_entropy", "target_entropy", "path_entropy", "top1_logprob", "path_score"}
    assert sum(row["count"] for row in content["curves"]["path_score"]) == content["samples"]
    told = capsys.readouterr().out
    assert "math" in told and "terminal confidence rank of chain(k=2)" in told


def test_refusals(tmp_path, refused):
    trace = write_many(tmp_path / "trace")
    assert "--bins must be 1 or more" in refused(lambda: main([str(trace), "--bins", "0"]))
    assert "holds no drafter 'x'" in refused(lambda: main([str(trace), "--drafter", "x"]))
