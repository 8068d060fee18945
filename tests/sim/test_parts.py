"""A replay in parts is the replay of the whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from policies.chain import Chain
from policies.registry import load_policy
from sim import parts
from sim.replay import replay
from tests.sim.by_hand import write_by_hand
from traces.recording import open_recording


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("spec", ["chain(k=2)", "eagle3(top_k=2, depth=2, total_tokens=4)", "static(tree=((0,), (1,)))"])
@pytest.mark.parametrize("batch", [1, 2])
def test_parts_change_nothing(tmp_path: Path, monkeypatch, two_threads, spec, batch):
    recording, policy = open_recording(write_by_hand(tmp_path / "trace")), load_policy(spec)
    sequences = torch.tensor([2, 0, 0, 2, 0])
    whole = replay(recording, policy, sequences=sequences, batch=batch, keep_trees=True)
    monkeypatch.setattr(parts, "MOST_ROWS", 2)
    assert len(parts.cut(policy, torch.ones(5, dtype=torch.int64), batch)) > 1
    cut = replay(recording, policy, sequences=sequences, batch=batch, keep_trees=True)
    for name, column in vars(whole).items():
        assert torch.equal(column, getattr(cut, name)), name
    assert torch.get_num_threads() == 2


def test_serving_batches_stay_whole(monkeypatch, two_threads):
    monkeypatch.setattr(parts, "MOST_ROWS", 4)
    length = torch.tensor([3, 9, 4, 8, 5, 7, 6])
    assert [part.tolist() for part in parts.cut(Chain(), length, 3)] == [[0, 1, 2, 3, 4, 5], [6]]
    for part in parts.cut(Chain(), length, 3):
        assert part.tolist()[0] % 3 == 0, "a batch was split"
    assert [part.tolist() for part in parts.cut(Chain(), length, 1)] == [[1, 3, 5, 6], [4, 2, 0]]


@pytest.mark.parametrize("scope", ["stream", "batch"])
def test_a_state_that_outlives_rows_is_not_cut(monkeypatch, scope):
    monkeypatch.setattr(parts, "MOST_ROWS", 1)

    class Lasting(Chain):
        pass

    Lasting.scope = scope
    assert [part.tolist() for part in parts.cut(Lasting(), torch.tensor([3, 9]), 1)] == [[0, 1]]


def test_an_error_of_a_part_is_seen(two_threads):
    def fail(part: int) -> int:
        raise ValueError(part)

    with pytest.raises(ValueError):
        parts.in_threads(fail, [1, 2])
    assert torch.get_num_threads() == 2
