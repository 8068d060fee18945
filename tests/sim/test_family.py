"""A family's one replay equals a replay of each member."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from policies.eagle3 import Eagle3
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


@pytest.mark.parametrize("seed", [3, 8])
def test_depths_and_budgets_of_one_draft(tmp_path: Path, seed: int):
    """Every depth is a part of the deepest tree; depths 4 and 5 want nodes that the recording does not hold."""
    plan = [ShardPlan(0, (0, 1, 2), "some"), ShardPlan(1, (3, 4), "others")]
    recording = write(tmp_path / "trace", Language(seed, steps=3), plan)  # few steps: many nodes of equal probability
    grid = [(depth, total) for depth in (5, 1, 3, 4, 2) for total in (1, 2, 5, 8, 30)]
    members = [load_policy(f"eagle3(top_k=3, depth={depth}, total_tokens={total})") for depth, total in grid]
    logs = family.replay_family(recording, members)
    for policy, log in zip(members, logs, strict=True):
        same(replay(recording, policy), log)
    assert logs[0].coverage < 1 and len({log.widths.shape[1] for log in logs}) > 3


def test_rows_that_stop_early(tmp_path: Path):
    """Where the context ends, rows draft fewer levels than their depth, and the last of them none at all."""
    recording = write(tmp_path / "trace", Language(3, steps=4), [ShardPlan(0, (0, 1, 2), "some")])
    short = replace(recording, manifest=recording.manifest | {"context_limit": 14})
    members = [load_policy(f"eagle3(top_k=3, depth={depth})") for depth in (1, 2, 3)]
    for policy, log in zip(members, family.replay_family(short, members), strict=True):
        same(replay(short, policy), log)
    assert int(log.levels.min()) == 0 and int(log.levels.max()) == 3


def test_a_heir_is_no_relative():
    """A class that overrides what it selects must say for itself what its parameters are."""

    class Heir(Eagle3):
        pass

    assert family.are_family([Eagle3(depth=2), Eagle3(depth=3)])
    assert not family.are_family([Heir(depth=2), Heir(depth=3)])
    assert len(family.families([Eagle3(depth=2), Heir(depth=2), Eagle3(depth=2, top_k=4), Eagle3(total_tokens=9)])) == 3


def test_only_families(tmp_path: Path):
    recording = open_recording(write_by_hand(tmp_path / "trace"))
    for stranger in ("eagle3(top_k=3)", "chain(k=2)"):
        with pytest.raises(UserError, match="do not draft the same trees"):
            family.replay_family(recording, [load_policy("eagle3(top_k=2)"), load_policy(stranger)])
