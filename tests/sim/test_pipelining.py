"""Drafting behind verification: which bets are won, and what that saves."""

from __future__ import annotations

import pytest
import torch

from policies.registry import load_policy
from sim.pipelining import first_choice_runs, pipelined_price, won_bets
from sim.pricing import price, price_parts
from sim.recorded import tensor
from sim.replay import replay
from tests.sim.by_hand import write_by_hand
from tests.sim.many_texts import content, write_many
from traces.costs import Profile
from traces.recording import open_recording


def test_first_choices_of_the_hand_written_forest(tmp_path):
    hand = open_recording(write_by_hand(tmp_path / "trace"))
    # text 0 at 10: 11 is right, below it 21 is not. At 11: 30 is not 12. At 12: 13 and 14 are right. text 2 at 40: 41,
    # END; at 41: END. Places without a draft count 0.
    assert first_choice_runs(hand, "hand").tolist() == [1, 0, 2, 0, 0, 0, 0, 2, 1, 0]


def test_bets_and_their_price(tmp_path):
    recording = open_recording(write_many(tmp_path / "trace"))
    cost = Profile(content()).cost("made-up")
    log = replay(recording, load_policy("chain(k=1)"))
    runs = first_choice_runs(recording, "made-up")
    won = won_bets(log, runs, tensor(recording.offset))
    assert 0 < int(won.sum()) < len(won)
    serial, parts = price(log, cost), price_parts(log, cost)
    found = pipelined_price(log, cost, recording, first_choice_runs(recording, "made-up"))
    assert torch.equal(found[~won], serial[~won])
    drafting = (parts["catch_up"] + parts["draft"])[won]  # a level takes less than a verification: all of it is hidden
    assert found[won].tolist() == pytest.approx((serial[won] - drafting).tolist())
    for index in won.nonzero()[:, 0].tolist():  # the cycle before accepted its one node, and the next token was a first choice
        before = index - 1
        assert log.sequence[before] == log.sequence[index] and log.accepted[before] == 1
        at = int(recording.offset[log.sequence[before]] + log.position[before])
        assert runs[at] >= 2


def test_plain_decoding_has_no_draft_to_hide(tmp_path):
    recording = open_recording(write_many(tmp_path / "trace"))
    cost = Profile(content()).cost("made-up")
    log = replay(recording, load_policy("autoregressive"))
    assert torch.equal(pipelined_price(log, cost, recording, first_choice_runs(recording, "made-up")), price(log, cost))
