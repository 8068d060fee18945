"""HedgeSpec's full-information form: it knows what every arm would have had accepted, and nothing ahead of time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from policies.arms import Arms
from policies.exp3spec import STREAM
from policies.hedgespec import HedgeSpec, normal_hedge
from policies.philox import draw, uniform
from policies.registry import all_policies, load_policy
from sim.hedge_bound import KnowingHedge, knowing, setting
from sim.replay import replay
from tests.policies.synthetic import Language
from tests.sim.synthetic_recording import write
from traces.manifest import ShardPlan

PLAN = [ShardPlan(0, (0, 1, 2), "one"), ShardPlan(1, (3, 4, 5), "two")]
ARMS = ((3, 2, 3), (9, 3, 3), (4, 3, 3))


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return write(tmp_path_factory.mktemp("hedge") / "trace", Language(6), PLAN, length=20)


def accepted_at(recording, arm, text: int) -> dict[int, int]:
    """What an arm has accepted where its own cycles begin in a text."""
    log = replay(recording, setting(arm))
    mine = log.sequence == text
    return dict(zip(log.position[mine].tolist(), log.accepted[mine].tolist(), strict=True))


def test_it_scores_every_arm_on_every_cycle(recording):
    """The arms drawn, cycle by cycle, are those of a hedge computed by hand."""
    bound = knowing(HedgeSpec(arms=ARMS, seed=2), recording, "made-up", np.array([1, 4]))
    log = replay(recording, bound, sequences=torch.tensor([1, 4]))
    for text in (1, 4):
        mine = log.sequence == text
        regret = torch.zeros((1, len(ARMS)), dtype=torch.float64)
        for number, (place, got) in enumerate(zip(log.position[mine].tolist(), log.accepted[mine].tolist(), strict=True)):
            cycle = bound.know(_Cycle(torch.tensor([text]), torch.tensor([place])))
            arm = int(draw(normal_hedge(regret), uniform(2, torch.tensor([text]), torch.tensor([number]), STREAM)))
            assert got == int(cycle[0, arm]), "the arm that was drawn is the one that was played"
            loss = 1 - (cycle.double() + 1) / (Arms(ARMS).deepest + 1)
            weight = normal_hedge(regret)
            regret = regret + ((weight * loss).sum() - loss)


def test_what_it_knows_is_what_each_arm_gets(recording):
    bound = knowing(HedgeSpec(arms=ARMS), recording, "made-up")
    for place, arm in enumerate(ARMS):
        for text in range(6):
            for position, accepted in accepted_at(recording, arm, text).items():
                known = bound.know(_Cycle(torch.tensor([text]), torch.tensor([position])))
                assert int(known[0, place]) == accepted


def test_it_is_a_bound_and_no_policy(recording):
    bound = knowing(load_policy("hedgespec"), recording, "made-up")
    assert bound.kind == "bound" and "every arm known" in bound.spec()
    assert KnowingHedge not in all_policies().values()


class _Cycle:
    def __init__(self, sequence, position):
        self.sequence, self.position = sequence, position
