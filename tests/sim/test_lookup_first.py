"""A rule before a recorded drafter: what its cycles are, what they cost, and where its name may be written."""

from __future__ import annotations

import json

import pytest
import torch

from policies.errors import UserError
from policies.registry import load_policy
from sim.family import replay_family
from sim.fit import fit
from sim.opening import open_sound, says
from sim.pricing import price_parts
from sim.replay import CycleLog, replay
from sim.setting import Setting
from sim.streaming import bytes_per_position
from tests.sim.many_texts import content, write_many
from traces.costs import Profile
from traces.recording import open_recording

BOTH = "prompt_lookup(ngram=3, least=1)+made-up"
RULE, NETWORK = BOTH.split("+")
EAGLE = "eagle3(top_k=3, depth=3, total_tokens=6)"
ARMS = "ucbspec(arms=((6, 3, 3), (8, 2, 7)))"
"""Each row asks for as many children as its arm says; the recording holds five."""
COLUMNS = ("sequence", "position", "kept", "accepted", "emitted", "catch_up", "drafted", "missing")


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    return open_recording(write_many(tmp_path_factory.mktemp("many") / "trace"))


def rows_of(log: CycleLog) -> list[tuple]:
    """The columns of each cycle, and its widths without their padding."""
    columns = zip(*(getattr(log, name).tolist() for name in COLUMNS), strict=True)
    return [(*row, [width for width in own if width]) for row, own in zip(columns, log.widths.tolist(), strict=True)]


@pytest.mark.parametrize("spec", [EAGLE, "chain(k=3)", "survival(threshold=0.3, most=3)", "static", ARMS])
@pytest.mark.parametrize("rule", [RULE, "suffix(least=0)", "racer(shortest=1, top=1)"])
def test_lockstep_is_one_by_one(recording, spec, rule):
    policy = load_policy(spec)
    whole = replay(recording, policy, f"{rule}+{NETWORK}")
    texts = torch.arange(len(recording.length)).split(1)
    alone = [replay(recording, policy, f"{rule}+{NETWORK}", sequences=text) for text in texts]
    assert rows_of(whole) == [row for log in alone for row in rows_of(log)]
    assert bool((whole.levels == 0).any()) and bool((whole.levels > 0).any())


def test_a_looked_up_cycle_costs_no_draft_and_is_caught_up_on(recording):
    log, cost = replay(recording, load_policy(EAGLE), BOTH), Profile(content()).cost(BOTH)
    parts = price_parts(log, cost)
    paid = Profile(content()).cost(NETWORK)
    free = log.levels == 0
    assert bool((log.drafted[free] > 0).all()) and bool((parts["draft"][free] == 0).all() & (parts["catch_up"][free] == 0).all())
    pending, cycles, most, last = 0, 0, 0, None
    for index, (sequence, accepted) in enumerate(zip(log.sequence.tolist(), log.accepted.tolist(), strict=True)):
        pending, cycles = (0, 0) if sequence != last else (pending, cycles)
        if not free[index]:
            assert int(log.catch_up[index]) == pending
            context, one = log.context_length[index], torch.tensor(1)
            assert float(parts["catch_up"][index]) == float(paid.catch_up_ms(torch.tensor(pending), context, one))
            assert float(parts["draft"][index]) > 0
            most, pending, cycles = max(most, cycles), 0, 0
        pending, cycles, last = pending + accepted + 1, cycles + 1, sequence
    assert most > 1  # cycles that were caught up on at once


@pytest.mark.parametrize("drafter", [BOTH, RULE, "suffix(least=0)+made-up"])
def test_families_agree(recording, drafter):
    """A rule's answer of fewer children than were asked for is no hole in the recording."""
    members = [load_policy(f"eagle3(top_k=3, depth={depth}, total_tokens={total})") for depth in (1, 3) for total in (2, 6)]
    for policy, log in zip(members, replay_family(recording, members, drafter), strict=True):
        alone = replay(recording, policy, drafter)
        assert rows_of(log) == rows_of(alone) and log.coverage == alone.coverage == 1.0


def test_a_forest_too_narrow_is_missing_where_it_drafts(recording):
    """Five children are recorded."""
    log = replay(recording, load_policy("eagle3(top_k=7, depth=1, total_tokens=4)"), BOTH)
    assert torch.equal(log.missing > 0, log.levels > 0) and 0 < log.coverage < 1


def test_both_must_be_readable(recording):
    held = recording.top_tokens.shape[1]
    with pytest.raises(UserError, match=f"the recording holds {held}"):
        open_sound(recording.folder, f"racer(top={held + 1})+made-up")
    with pytest.raises(UserError, match="holds no drafter 'nobody'"):
        open_sound(recording.folder, "suffix+nobody")
    with pytest.raises(UserError, match="no network behind its"):
        open_sound(recording.folder, "suffix+racer")
    assert open_sound(recording.folder, BOTH)[1] == BOTH
    assert bytes_per_position(recording, BOTH) == bytes_per_position(recording, NETWORK) > bytes_per_position(recording, RULE)


def test_the_network_is_priced():
    profile, one = Profile(content()), torch.tensor([1, 2])
    both, network = profile.cost("suffix(depth=3)+made-up"), profile.cost("made-up")
    assert torch.equal(both.draft_ms(one, one, one), network.draft_ms(one, one, one))
    assert torch.equal(both.catch_up_ms(one, one, one), network.catch_up_ms(one, one, one))
    with pytest.raises(UserError, match="has no drafter 'nobody'"):
        profile.cost("suffix+nobody")


def test_the_commands(recording, tmp_path, capsys, refused):
    from sim.contest import main
    from sim.sweep import main as sweep

    Profile(content()).save(tmp_path / "p.json")
    options = [str(recording.folder), "--profile", str(tmp_path / "p.json"), "--drafter", BOTH, "--resamples", "100"]
    main([*options, "--policy", "chain(k=2)", "--json", str(tmp_path / "out.json")])
    assert f"the training-free drafter {RULE} is priced at nothing" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert rows[-1]["drafter"] == BOTH and rows[-1]["coverage"] == 1.0
    grid = ["--policy", "eagle3(top_k=2)", "--grid", "depth=1:3", "total_tokens=2,4"]
    sweep([*options[:5], *grid, "--out", str(tmp_path / "sweep")])
    assert "6 settings" in capsys.readouterr().out
    told = refused(lambda: main([str(recording.folder), "--policy", "chain(k=2)", "--drafter", "suffix+"]))
    assert told == "drafter 'suffix+' has no network behind its '+': write RULE+NETWORK, such as suffix+eagle3"


def test_it_is_not_priced_pipelined(recording, tmp_path, refused):
    from sim.contest import main

    Profile(content()).save(tmp_path / "p.json")
    words = [str(recording.folder), "--profile", str(tmp_path / "p.json"), "--policy", "chain(k=2)", "--execution", "pipelined"]
    for drafter in (BOTH, RULE):
        told = refused(lambda d=drafter: main([*words, "--drafter", d]))
        assert told == (
            f"pipelined execution is not priced for {drafter}, which looks tokens up: give --execution serial, or name a recorded "
            "drafter"
        )
    facts = {"drafters": [{"name": "made-up", "kind": "eagle3"}], "target": {}}
    for drafter, how in ((BOTH, "an estimate"), (NETWORK, "an estimate"), (RULE, "exact")):
        (line,) = says(facts, Setting(drafter, execution="pipelined"))
        assert how in line, "a rule does not make a head depend on committed tokens alone"


def test_a_policy_is_fitted_on_it(recording):
    cost = Profile(content()).cost(BOTH)
    fitted, how, _ = fit(recording, load_policy("expected_value"), drafter=BOTH, cost=cost)
    other, _, _ = fit(recording, load_policy("expected_value"), drafter=NETWORK, cost=cost)
    assert how["drafter"] == BOTH
    assert fitted.next_ != other.next_  # it learned from other drafts
    with pytest.raises(UserError, match="holds no drafter 'nobody'"):
        fit(recording, load_policy("expected_value"), drafter="suffix+nobody", cost=cost)
