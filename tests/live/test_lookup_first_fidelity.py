"""A rule before a network, live: the cycles of its replay, the target's own text, alone and in batches with two owners of rows."""

from __future__ import annotations

import pytest
import torch

from live.decode import SpeculativeDecoder
from live.fidelity import check_policy, main
from live.joining import beside, join
from live.looking_up_first import LiveLookupFirst
from policies.errors import UserError
from policies.lookup.first import LookupFirst
from policies.registry import load_policy
from sim.replay import replay
from traces.recording import open_recording

EAGLE = "eagle3(total_tokens=16, depth=5, top_k=8)"
SURVIVAL = "survival(threshold=0.1, most=10)"
DRAFTERS = ("prompt_lookup(ngram=2)+eagle3", "suffix+draft", "racer(shortest=6, top=1)+eagle3")
PROMPTS = [[5, 6, 7, 8, 5, 6, 7], [9, 3, 9, 3, 9], [11, 12], [20, 21, 22, 23, 24, 25]]
LIMITS = [40, 25, 33, 30]


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("spec", ["chain(k=6)", EAGLE, SURVIVAL])
def test_float64_is_the_proof(tiny_recording, pair64, drafter, spec):
    recording, policy = open_recording(tiny_recording), load_policy(spec)
    report = check_policy(recording, pair64, policy, drafter, 60)
    assert report.identical == report.cycles and not report.notes and report.largest < 1e-4
    log = replay(recording, policy, drafter)
    assert log.coverage == 1.0 and bool((log.levels == 0).any()) and bool((log.levels > 0).any())  # both of them drafted


def test_sampled_texts_too(tiny_sampled, pair64):
    report = check_policy(open_recording(tiny_sampled), pair64, load_policy(EAGLE), "prompt_lookup+eagle3", 24, 1.0)
    assert report.identical == report.cycles >= 24, report.notes


def test_the_same_object_runs_in_replay(pair64):
    assert issubclass(LiveLookupFirst, LookupFirst) and LiveLookupFirst.expand is LookupFirst.expand
    assert LiveLookupFirst.root is LookupFirst.root


@pytest.mark.parametrize("drafter", ["prompt_lookup(ngram=2)+eagle3", "racer(shortest=2, top=1)+draft"])
def test_a_batch_of_two_owners(pair64, drafter):
    """Each text is the plain one, in the cycles that it takes alone, whoever drafts for its neighbours."""
    plain = SpeculativeDecoder(pair64.target(), pair64.draft("suffix"), load_policy("autoregressive"), pair64.end_tokens)
    decoder = SpeculativeDecoder(pair64.target(), pair64.draft(drafter), load_policy(EAGLE), pair64.end_tokens)
    owners = []

    def note(step) -> None:
        owners.append(set((step.done.draft.widths[:, 0] > 0).tolist()) if step.done.draft.widths.shape[1] else set())

    together = decoder.generate(PROMPTS, LIMITS, on_step=note)
    assert {True, False} in owners
    assert together.tokens == plain.generate(PROMPTS, LIMITS).tokens
    for row, limit in enumerate(LIMITS):
        alone = decoder.generate([PROMPTS[row]], limit, text=torch.tensor([row]))
        assert alone.tokens == [together.tokens[row]] and alone.cycles == [together.cycles[row]]


def test_rows_that_join_what_both_parts_know(pair64):
    """Joined in mid-generation, behind cycles that were looked up: the network still catches up on them."""
    decoder = SpeculativeDecoder(pair64.target(), pair64.draft("prompt_lookup+eagle3"), load_policy(EAGLE), pair64.end_tokens)
    wanted = [decoder.generate([PROMPTS[row]], LIMITS[row]).tokens[0] for row in (0, 1)]
    texts, waiting = [[], []], 0
    decoder.prefill([PROMPTS[0]], LIMITS[0], row=torch.tensor([0]))
    texts[0].append(int(decoder._root))
    while not (waiting := waiting + bool(decoder.drafter.network._pending)) or waiting < 2:
        step = decoder.step()
        texts[0] += step.tokens[0, : int(step.gained)].tolist()
    other = beside(decoder)
    assert other.drafter.network.network is not decoder.drafter.network.network
    other.prefill([PROMPTS[1]], LIMITS[1], row=torch.tensor([1]))
    texts[1].append(int(other._root))
    join(decoder, other)
    while (step := decoder.step()) is not None:
        for row, new, count in zip(step.row.tolist(), step.tokens.tolist(), step.gained.tolist(), strict=True):
            texts[row] += new[:count]
    assert texts == wanted


def test_the_network_rests_in_a_looked_up_cycle(pair64, monkeypatch):
    """It is neither run nor caught up on what was committed, and then catches up on all of it at once."""
    decoder = SpeculativeDecoder(pair64.target(), pair64.draft("prompt_lookup(ngram=2)+eagle3"), load_policy("chain(k=3)"), [])
    network, asked = decoder.drafter.network.network, []
    monkeypatch.setattr(network, "advance", watched(network.advance, lambda tokens, features, counts: asked.append(int(counts))))
    pending, seen = 0, []

    def note(step) -> None:
        nonlocal pending
        drafted = int(step.done.draft.widths[0, 0]) > 0
        seen.append(drafted)
        assert asked == ([pending] if drafted and pending else [])
        asked.clear()
        pending = (0 if drafted else pending) + int(step.done.walk.accepted) + 1

    decoder.generate([PROMPTS[1]], 60, on_first=lambda first: asked.clear(), on_step=note)
    assert True in seen and False in seen


def watched(call, note):
    def made(*arguments):
        note(*arguments)
        return call(*arguments)

    return made


def test_what_a_pair_has(pair64):
    with pytest.raises(UserError, match=r"no network of the pair behind its '\+': write one that is loaded \(eagle3, draft\)"):
        pair64.draft("suffix+nobody")
    assert pair64.captured_for(pair64.draft("suffix+eagle3")) == pair64.captured
    assert pair64.captured_for(pair64.draft("suffix+draft")) == ()


def test_the_command(tiny_recording, capsys, refused):
    options = ["--policy", "chain(k=2)", "--cycles", "12", "--witness", "0", "--skip-generate"]
    assert main([str(tiny_recording), *options, "--drafter", "suffix+eagle3"]) == 0
    assert "suffix+eagle3" in capsys.readouterr().out
    assert "holds no drafter 'nobody'" in refused(lambda: main([str(tiny_recording), "--drafter", "suffix+nobody"]))
    assert "recording holds 8" in refused(lambda: main([str(tiny_recording), "--drafter", "racer(top=9)+eagle3"]))
