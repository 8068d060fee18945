"""What must be told under a table of policies whose times are not of one kind."""

from __future__ import annotations

from policies.registry import load_policy
from sim.opening import says
from sim.setting import Setting

FACTS = {"drafters": [{"name": "made-up"}], "target": {}, "profile": {"kind": "measured", "target": None, "machine": "none"}}


def test_two_schedules_in_one_table_are_told():
    alone, whole = load_policy("chain(k=2)"), load_policy("tetris")
    for batch, policies, told in ((4, [alone, whole], True), (1, [alone, whole], False), (4, [alone], False), (4, [whole], False)):
        assert bool([line for line in says(FACTS, Setting("made-up", batch), policies) if "fixed groups" in line]) is told
