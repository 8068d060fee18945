"""Block by block or all at once: the same bits, whatever the policy remembers and however many decode together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import sim.family
import sim.replay
from policies.chain import Chain
from policies.contract import Expansion
from policies.registry import load_policy
from sim.replay import replay, replay_blocks
from sim.setting import Setting
from sim.streaming import blocks, bytes_per_position, let_go
from sim.trial import run_trials
from tests.policies.synthetic import Language
from tests.sim.many_texts import PLAN, content
from tests.sim.synthetic_recording import write
from traces import cache
from traces.costs import Profile
from traces.recording import Recording, open_recording

COST = Profile(content()).cost("made-up")


class Crowd(Chain):
    """Drafts as many tokens as there are requests in the group."""

    batch_wide = True

    def expand(self, tree, cycle, state):
        others = (cycle.group[:, None] == cycle.group[None, :]).sum(1)
        if tree.levels >= 3:
            return None
        return Expansion(tree.frontier(1).masked_fill((others <= tree.levels)[:, None], -1), 1)


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Recording:
    return write(tmp_path_factory.mktemp("stream") / "trace", Language(3, steps=5), PLAN)


@pytest.fixture
def given_back(monkeypatch) -> list:
    """One entry for each time that the recording's memory was given back."""
    times = []
    for module in (sim.replay, sim.family):
        monkeypatch.setattr(module, "let_go", lambda recording: times.append(1) or let_go(recording))
    return times


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("spec", ["eagle3(depth=3, top_k=3)", "ucbspec(arms=(1, 2, 3))", "hf_heuristic", "crowd"])
def test_replay(recording: Recording, given_back, spec: str, batch: int):
    policy = Crowd() if spec == "crowd" else load_policy(spec)
    order = torch.tensor([3, 0, 9, 1, 2, 8, 7, 4, 5, 6])
    whole = replay(recording, policy, sequences=order, batch=batch, keep_trees=True)
    assert not given_back
    streamed = replay(replace(recording, memory=1), policy, sequences=order, batch=batch, keep_trees=True)
    assert len(given_back) == -(-10 // batch), "every serving batch is a block of its own, or the test proves nothing"
    for name, column in vars(whole).items():
        assert torch.equal(column, getattr(streamed, name)), name


def test_what_a_request_taught_goes_on(recording: Recording):
    """Forgetting between blocks would be seen: fresh states give another replay."""
    policy = load_policy("hf_heuristic")
    streamed = replay(replace(recording, memory=1), policy)
    fresh = [next(replay_blocks(recording, policy, sequences=torch.tensor([text]))) for text in range(10)]
    assert not torch.equal(streamed.kept, torch.cat([log.kept for log in fresh]))


@pytest.mark.parametrize("setting", [{}, {"batch": 4}, {"batch": 3, "ragged": "sum"}, {"execution": "pipelined"}], ids=str)
def test_sums_of_families_and_loners(recording: Recording, given_back, setting: dict):
    family = [f"eagle3(top_k=3, depth={depth}, total_tokens={total})" for depth in (2, 3) for total in (4, 8)]
    policies = [load_policy(spec) for spec in (*family, "chain(k=3)", "hf_heuristic")]
    found = [
        [sums.to_json() for sums in run_trials(one, policies, Setting("made-up", **setting), COST)]
        for one in (recording, replace(recording, memory=1))
    ]
    assert found[0] == found[1] and len(given_back) >= 3


def test_blocks_fill_the_budget(recording: Recording):
    size = 18 * bytes_per_position(recording)  # of one text
    texts, policy = torch.arange(10), load_policy("eagle3")

    def cut(budget: float, batch: int = 1, scope: str = "cycle") -> list[list[int]]:
        lasting = type("Lasting", (Chain,), {"scope": scope})()
        return [block.tolist() for block in blocks(replace(recording, memory=budget), lasting, texts, batch)]

    assert cut(4.5 * size) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert cut(4.5 * size, batch=3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8, 9]]
    assert cut(1, batch=4) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert cut(1, scope="batch") == [list(range(10))]
    assert len(blocks(recording, policy, texts)) == 1


def test_what_was_given_back_can_be_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_MAPPED_FROM", 1)
    write(tmp_path / "trace", Language(3, steps=5), PLAN)
    recording = open_recording(tmp_path / "trace")
    before = {name: array.copy() for name, array in recording.arrays.items()}
    assert any(isinstance(array, np.memmap) for array in recording.arrays.values())
    let_go(recording)
    for name, array in recording.arrays.items():
        assert np.array_equal(array, before[name], equal_nan=array.dtype.kind == "f"), name
