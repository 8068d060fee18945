"""A family's one replay equals a replay of each member."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from policies.errors import UserError
from policies.registry import load_policy
from sim import family
from sim.replay import replay
from tests.policies.synthetic import Language
from tests.sim.by_hand import write_by_hand
from tests.sim.synthetic_recording import write
from traces.manifest import ShardPlan
from traces.recording import open_recording


def same(one, other) -> None:
    for name, column in vars(one).items():
        found = getattr(other, name)
        assert (column is None and found is None) or torch.equal(column, found), name


@pytest.mark.parametrize("overrun", [0, 2])
def test_by_hand(tmp_path: Path, overrun: int):
    recording = open_recording(write_by_hand(tmp_path / "trace", overrun=overrun))
    members = [load_policy(f"eagle3(top_k=2, depth=2, total_tokens={total})") for total in (1, 2, 3, 4, 7)]
    for policy, log in zip(members, family.replay_family(recording, members), strict=True):
        same(replay(recording, policy), log)


def test_synthetic_texts(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(family, "POSITIONS", 17)  # chunks that end inside a text
    plan = [ShardPlan(0, (0, 1, 2), "some"), ShardPlan(1, (3, 4), "others")]
    recording = write(tmp_path / "trace", Language(3, steps=4), plan)
    members = [load_policy(f"eagle3(top_k=3, depth=3, total_tokens={total})") for total in (1, 3, 5, 8, 30)]
    logs = family.replay_family(recording, members)
    for policy, log in zip(members, logs, strict=True):
        same(replay(recording, policy), log)
    assert len({int(log.accepted.sum()) for log in logs}) > 2, "the members must differ, or the test proves nothing"
    chosen = torch.tensor([4, 1])
    same(replay(recording, members[2], sequences=chosen), family.replay_family(recording, members, sequences=chosen)[2])


def test_only_families(tmp_path: Path):
    recording = open_recording(write_by_hand(tmp_path / "trace"))
    for stranger in ("eagle3(top_k=3)", "chain(k=2)"):
        with pytest.raises(UserError, match="do not draft the same trees"):
            family.replay_family(recording, [load_policy("eagle3(top_k=2)"), load_policy(stranger)])
