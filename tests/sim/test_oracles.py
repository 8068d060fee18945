"""Clairvoyant bounds against exhaustive search, and against what policies really do."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from policies.registry import load_policy
from sim.oracles import FewestCycles, LeastTime, bound, true_path
from sim.setting import Setting
from sim.trial import run_trial
from tests.policies.synthetic import Language
from tests.sim.by_hand import write_by_hand
from tests.sim.synthetic_recording import write
from tests.sim.test_pricing import COST
from traces.manifest import ShardPlan
from traces.recording import Recording, open_recording

PLAN = [ShardPlan(0, (0, 1, 2), "one"), ShardPlan(1, (3, 4, 5), "two")]


@pytest.fixture(scope="module", params=[1, 2, 3])
def recording(request, tmp_path_factory) -> Recording:
    return write(tmp_path_factory.mktemp("oracle") / "trace", Language(request.param), PLAN)


def drafted_truth(recording: Recording, sequence: int) -> list[int]:
    """How many true tokens the recorded forest proposes one after the other at each position, node by node."""
    forest = recording.forest(recording.drafters[0])
    start, end = recording.offset[sequence : sequence + 2]
    found = []
    for place in range(int(recording.length[sequence]) - 1):
        row, depth = int(forest.root[start + place]), 0
        while row >= 0 and start + place + depth + 1 < end:
            ranks = np.flatnonzero(forest.child_token[row] == recording.token[start + place + depth + 1])
            if not len(ranks):
                break
            row, depth = int(forest.child_row[row, ranks[0]]), depth + 1
        found.append(depth)
    return found


def cheapest(recording: Recording, sequence: int, cost) -> float:
    """Every way of cutting the text into cycles, with what each has to pay; cycles alone when there is no cost."""
    drafted, last = drafted_truth(recording, sequence), int(recording.length[sequence]) - 1
    one = torch.tensor(1)

    def ms(place: int, accepted: int, waiting: int) -> float:
        if cost is None:
            return 1.0
        context = torch.tensor(int(recording.context_length[recording.offset[sequence] + place]))
        count = torch.tensor(accepted + 1)
        parts = cost.verify_ms(count, context, one) + cost.commit_ms(count, one) + cost.overhead_ms(count - 1, one)
        if accepted:
            parts = parts + cost.catch_up_ms(torch.tensor(waiting), context, one)
        for _ in range(accepted - 1):
            parts = parts + cost.draft_ms(one, context, one)
        return float(parts)

    @cache
    def rest(place: int, waiting: int) -> float:
        if place >= last:
            return 0.0
        ways = []
        for accepted in range(drafted[place] + 1):
            behind = (waiting if accepted == 0 else 0) + accepted + 1
            ways.append(ms(place, accepted, waiting) + rest(place + accepted + 1, behind))
        return min(ways)

    return rest(0, 0)


@pytest.mark.parametrize("cost", [None, COST], ids=["cycles", "time"])
def test_against_every_way_of_cutting_a_text(recording, cost):
    oracle = FewestCycles() if cost is None else LeastTime(cost)
    plan = oracle.plan(true_path(recording))
    wanted = [cheapest(recording, sequence, cost) for sequence in range(len(recording.length))]
    assert plan.tolist() == pytest.approx(wanted, rel=1e-12)
    assert len(set(plan.tolist())) > 1


def test_by_hand(tmp_path):
    hand = open_recording(write_by_hand(tmp_path / "trace"))
    path = true_path(hand)
    # text 0 counts 10 11 12 13: at 10 the forest proposes 11 12, and 13 is the bonus: one cycle. Text 2: 40 41 END.
    assert path.depth.tolist() == [[2, 1, 0], [0, 0, 0], [1, 0, 0]]
    assert path.steps.tolist() == [3, 0, 2]
    assert FewestCycles().plan(path).tolist() == [1, 0, 1]
    sums = bound(hand, FewestCycles())
    assert (sums.sequence.tolist(), sums.domain.tolist()) == ([0, 2], [0, 1])  # text 1 has no cycle
    assert sums.by_domain("tau") == {"easy": 3.0, "hard": 2.0}


@pytest.mark.parametrize(
    "spec", ["autoregressive", "chain(k=2)", "eagle3(total_tokens=9, depth=3, top_k=3)", "threshold(top_k=3, depth=3)"]
)
def test_no_policy_beats_them(recording, spec):
    setting = Setting(recording.drafters[0])
    sums = run_trial(recording, load_policy(spec), setting, COST)
    fewest, least = (bound(recording, oracle) for oracle in (FewestCycles(), LeastTime(COST)))
    assert (sums.sums["cycles"] >= fewest.sums["cycles"]).all()
    assert (sums.sums["ms"] >= least.sums["ms"] - 1e-9).all()
    assert sums.sums["emitted"].tolist() == fewest.sums["emitted"].tolist() == least.sums["emitted"].tolist()
    assert fewest.figures == ["tau"] and fewest.mean("tau") >= sums.mean("tau")
    assert least.figures == ["ms_per_token"] and least.mean("ms_per_token") <= sums.mean("ms_per_token")


def test_some_texts_only(recording):
    chosen = torch.tensor([4, 1])
    whole = LeastTime(COST).plan(true_path(recording))
    assert torch.equal(LeastTime(COST).plan(true_path(recording, sequences=chosen)), whole[chosen])
    sums = bound(recording, LeastTime(COST), sequences=chosen)
    assert sums.sequence.tolist() == [1, 4] and sums.sums["ms"].tolist() == whole[[1, 4]].tolist()
