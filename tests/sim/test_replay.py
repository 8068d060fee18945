"""Replay against traces small enough to work out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from policies.chain import Chain
from policies.contract import Expansion, State
from policies.errors import UserError
from policies.order import NONE
from policies.registry import load_policy
from sim.recorded import RecordedVerifier
from sim.replay import replay
from tests.sim.by_hand import write_by_hand
from traces.recording import Recording, open_recording


@pytest.fixture(scope="module")
def hand(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    return open_recording(write_by_hand(tmp_path_factory.mktemp("hand") / "trace"))


def cycles(log) -> list[tuple[int, ...]]:
    """(sequence, position, kept, accepted, emitted, drafted, catch-up, missing) of each cycle."""
    names = ("sequence", "position", "kept", "accepted", "emitted", "drafted", "catch_up", "missing")
    return list(zip(*(getattr(log, name).tolist() for name in names), strict=True))


def test_autoregressive(hand):
    log = replay(hand, load_policy("autoregressive"))
    # text 0 counts 10 11 12 13: three cycles behind the prefill's 10. Text 1 is its first token only.
    # text 2 is 40 41 EOS.
    assert cycles(log) == [
        (0, 0, 0, 0, 1, 0, 0, 0),
        (0, 1, 0, 0, 1, 0, 0, 0),
        (0, 2, 0, 0, 1, 0, 0, 0),
        (2, 0, 0, 0, 1, 0, 0, 0),
        (2, 1, 0, 0, 1, 0, 0, 0),
    ]
    assert log.widths.shape == (5, 0) and log.coverage == 1.0
    assert log.context_length.tolist() == [2, 3, 4, 3, 4]  # prompts of two and three tokens


def test_chain_of_two(hand):
    log = replay(hand, load_policy("chain(k=2)"), keep_trees=True)
    # text 0 at 10: drafts 11 21; the target says 11 12, so 11 is accepted and 12 the bonus. At 12: drafts 13 14; both
    # are accepted (14 lies beyond the limit), one token counts; before it drafts, the draft catches up on 11 and 12.
    # text 2 at 40: drafts 41 EOS; both accepted, nothing follows an end of sequence.
    assert cycles(log) == [(0, 0, 2, 1, 2, 2, 0, 0), (0, 2, 2, 2, 1, 2, 2, 0), (2, 0, 2, 2, 2, 2, 0, 0)]
    assert log.kept_tokens.tolist() == [[10, 11, 21], [12, 13, 14], [40, 41, 99]]
    assert log.kept_parents.tolist() == [[NONE, 0, 1]] * 3
    assert log.path.tolist() == [[1, NONE], [1, 2], [1, 2]]
    assert log.widths.tolist() == [[1, 1]] * 3 and log.levels.tolist() == [2, 2, 2]


def test_dynamic_tree(hand):
    log = replay(hand, load_policy("eagle3(top_k=2, depth=2, total_tokens=4)"), keep_trees=True)
    # text 0 at 10: 11 (-0.1), 20 (-2.5); below 11: 21 (-0.3), 12 (-1.9); below 20: 22 (-3.0), 23 (-3.5). The best three
    # are 11, 21, 12, in node order. 11 and 12 are accepted, 13 is the bonus: all three tokens that count.
    # text 2 at 40: 41 (-0.2), 50 (-1.7); 99 (-0.3), 51 (-3.2); 52 (-2.1), 53 (-3.6): keeps 41, 50, 99.
    assert cycles(log) == [(0, 0, 3, 2, 3, 6, 0, 0), (2, 0, 3, 2, 2, 6, 0, 0)]
    assert log.kept_tokens.tolist() == [[10, 11, 21, 12], [40, 41, 50, 99]]
    assert log.kept_parents.tolist() == [[NONE, 0, 1, 1], [NONE, 0, 0, 1]]
    assert log.path.tolist() == [[1, 3], [1, 3]]
    assert log.widths.tolist() == [[1, 2]] * 2


def test_what_was_not_recorded_is_a_leaf_and_is_counted(hand):
    log = replay(hand, load_policy("chain(k=3)"))
    # 21 (off the truth) and 14 were never expanded; EOS was: its child 55 is kept, and never tested.
    assert cycles(log) == [(0, 0, 2, 1, 2, 2, 0, 1), (0, 2, 2, 2, 1, 2, 2, 1), (2, 0, 3, 2, 2, 3, 0, 0)]
    assert log.coverage == pytest.approx(1 / 3)
    wide = replay(hand, load_policy("static(tree=[[0], [1], [2]])"))  # two children are recorded
    assert wide.missing.tolist() == [1] * len(wide.missing) and wide.coverage == 0.0


def test_a_tree_that_outgrows_the_recorded_truth_is_missing(hand, tmp_path):
    """Where the recording ends, nobody knows whether the next node would have been accepted."""
    short = open_recording(write_by_hand(tmp_path / "trace", overrun=0))  # text 0 ends at 13
    log = replay(short, load_policy("chain(k=2)"), sequences=torch.tensor([0]))
    assert log.position.tolist() == [0, 2] and log.emitted.tolist() == [2, 1]
    assert log.missing.tolist() == [0, 1]


def spying(seen: list) -> Chain:
    class Spy(Chain):
        def observe(self, outcome, cycle, state):
            seen.append((cycle, outcome))
            return state

    return Spy(k=2)


def test_the_target_is_asked_for_its_likeliest_tokens_by_those_who_read_them(hand, monkeypatch):
    asked, seen, real = [], [], RecordedVerifier.target_top
    monkeypatch.setattr(RecordedVerifier, "target_top", lambda *about: asked.append(about) or real(*about))
    replay(hand, spying(seen), sequences=torch.tensor([0]))
    assert len(seen) == 2 and not asked
    (_, told), _ = seen
    assert told.top_tokens.shape == told.top_logprobs.shape and len(asked) == 1


def test_policies_see_positions_room_and_the_target(hand):
    seen = []
    replay(hand, spying(seen), sequences=torch.tensor([0]))
    (first, told), (second, _) = seen
    assert (int(first.room), int(second.room)) == (3, 1)
    assert (int(first.reach), int(second.reach)) == (61, 59)  # places behind the root in a context of 64
    assert [int(cycle.number) for cycle, _ in seen] == [0, 1]
    hand.manifest["max_new_tokens"] = 9
    again = []
    replay(hand, spying(again), sequences=torch.tensor([0]))
    assert [int(cycle.room) for cycle, _ in again] == [8, 6]  # the recorder's limit; where the text ended is not told
    assert [int(cycle.position) for cycle, _ in again] == [int(cycle.position) for cycle, _ in seen]
    assert float(second.root_entropy) == hand.entropy[2] and float(second.root_logprob) == hand.logprob[2]
    assert told.status.tolist() == [[NONE, 1, 0]] and (int(told.accepted), int(told.bonus)) == (1, 12)
    assert told.top_tokens.tolist() == [hand.top_tokens[1:3].tolist()]
    assert told.top_logprobs.tolist() == [hand.top_logprobs[1:3].tolist()]


class Growing(Chain):
    """A chain of one node until something was accepted, of two from then on."""

    scope = "sequence"

    def init(self, rows: int, key: torch.Tensor) -> State:
        return {"accepted": torch.zeros(rows, dtype=torch.int64)}

    def expand(self, tree, cycle, state) -> Expansion | None:
        wanted = 1 + (state["accepted"] > 0)
        if tree.levels == 2:
            return None
        return Expansion(tree.frontier(1).masked_fill((wanted <= tree.levels)[:, None], NONE), 1)

    def observe(self, outcome, cycle, state) -> State:
        return {"accepted": state["accepted"] + outcome.accepted}


class GrowingForever(Growing):
    """The same, but what it learned outlives the request."""

    scope = "stream"


def test_state_stays_with_its_row(hand):
    log = replay(hand, Growing())
    # text 0: 11 (accepted), then 13 14. Text 2: 41 (accepted, EOS is the bonus) and leaves in the first cycle.
    assert cycles(log) == [(0, 0, 1, 1, 2, 1, 0, 0), (0, 2, 2, 2, 1, 2, 2, 0), (2, 0, 1, 1, 2, 1, 0, 0)]
    backwards = replay(hand, Growing(), sequences=torch.tensor([1, 2, 0]))
    assert cycles(backwards) == cycles(log)


def test_a_stream_is_replayed_in_request_order(hand):
    log = replay(hand, GrowingForever(), sequences=torch.tensor([0, 2]))
    # text 0 as above; by then two nodes are drafted, and text 2 begins with 41 EOS.
    assert [row[:4] for row in cycles(log)] == [(0, 0, 1, 1), (0, 2, 2, 2), (2, 0, 2, 2)]
    log = replay(hand, GrowingForever(), sequences=torch.tensor([2, 0]))
    # text 2 drafts 41 alone; text 0 begins with two nodes.
    assert [row[:4] for row in cycles(log)] == [(0, 0, 2, 1), (0, 2, 2, 2), (2, 0, 1, 1)]


def test_catch_up_waits_until_the_policy_drafts(hand):
    class Second(Chain):
        def expand(self, tree, cycle, state):
            if tree.levels == 1:
                return None
            return Expansion(tree.root_nodes().masked_fill((cycle.position != 2)[:, None], NONE), 1)

    log = replay(hand, Second(), sequences=torch.tensor([0]))
    # plain steps to 11 and to 12; then both are caught up on.
    assert [(row[1], row[2], row[6]) for row in cycles(log)] == [(0, 0, 0), (1, 0, 0), (2, 1, 2)]
    assert log.levels.tolist() == [0, 0, 1]


def test_groups(hand):
    groups = []

    class Grouped(Chain):
        def begin(self, cycle, state):
            groups.append(cycle.group.tolist())
            return state

    replay(hand, Grouped(k=1), sequences=torch.tensor([2, 0]))
    replay(hand, Grouped(k=1), batch=2)
    assert groups[0] == [0, 1] and [0, 0] in groups


def test_nothing_to_replay(hand):
    with pytest.raises(UserError, match="nothing to replay"):
        replay(hand, load_policy("chain"), sequences=torch.tensor([1]))
    with pytest.raises(UserError, match="holds no drafter 'other'"):
        replay(hand, load_policy("chain"), "other")
    with pytest.raises(UserError, match="must be fitted"):
        replay(hand, load_policy("heterospec"))


@pytest.mark.parametrize("spec", ["eagle3", "static(tree=medusa)", "heterospec(thresholds_=[2.0, 4.0, 8.0], depth=4)"])
def test_batch_size_changes_nothing(tiny_recording: Path, spec: str):
    recording, policy = open_recording(tiny_recording), load_policy(spec)
    together = replay(recording, policy, keep_trees=True)
    for group in ([0], [1, 2], [5, 3, 4]):
        alone = replay(recording, policy, sequences=torch.tensor(group), keep_trees=True)
        mine = torch.isin(together.sequence, torch.tensor(group))
        for name, column in vars(alone).items():
            other = getattr(together, name)[mine]
            if column.dim() == 2:
                width = min(column.shape[1], other.shape[1])  # padding follows the longest cycle in the log
                assert bool((other[:, width:] <= 0).all()) and bool((column[:, width:] <= 0).all())
                column, other = column[:, :width], other[:, :width]
            assert torch.equal(column, other), name
