"""Training-free drafters: the live decoder and the replay run the same code on the same past, and so agree in every cycle."""

from __future__ import annotations

import pytest
import torch

import live.tandem
from live.decode import SpeculativeDecoder
from live.fidelity import check_policy, main
from live.looking_up import LiveLookup
from policies.contract import Sampling
from policies.errors import run_command
from policies.lookup.rule import load_rule
from policies.registry import load_policy
from traces.recording import open_recording

DRAFTERS = ("prompt_lookup(ngram=2)", "suffix", "racer")
EAGLE = "eagle3(total_tokens=16, depth=5, top_k=8)"


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("spec", [EAGLE, "chain(k=5)", "static", "dyspec"])
def test_float64_is_the_proof(tiny_recording, pair64, drafter, spec):
    report = check_policy(open_recording(tiny_recording), pair64, load_policy(spec), drafter, 24)
    assert report.identical == report.cycles >= 24 and not report.notes
    assert report.largest < 1e-5


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_sampled_texts_too(tiny_sampled, pair64, drafter):
    report = check_policy(open_recording(tiny_sampled), pair64, load_policy(EAGLE), drafter, 24, 1.0)
    assert report.identical == report.cycles >= 24, report.notes


def test_a_text_resumed_in_mid_generation():
    """Put back where a replay stands, the live drafter knows what it knew: the tokens, and what the target said before them."""
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 9, (1, 40), generator=draw)
    said, sure = torch.randint(0, 9, (1, 40, 8), generator=draw), torch.randn((1, 40, 8), generator=draw)
    grown, resumed = LiveLookup(load_rule("racer")), LiveLookup(load_rule("racer"))
    grown.prefill(tokens[:, :5], torch.tensor([5]), None, tokens[:, 5])
    for start, stop in ((6, 7), (7, 19), (19, 23), (23, 40)):
        padding = torch.full((1, 3), 77)  # more nodes were walked than tokens count
        grown.hear(torch.cat([said[:, start:stop], said[:, :3]], 1), torch.cat([sure[:, start:stop], sure[:, :3]], 1))
        grown.commit(torch.cat([tokens[:, start:stop], padding], 1), None, torch.tensor([stop - start]))
    resumed.prefill(tokens[:, :39], torch.tensor([39]), None, tokens[:, 39])
    resumed.recall(said[0, 6:], sure[0, 6:])
    one, two = grown._committed(None), resumed._committed(None)
    assert torch.equal(one.context()[0], tokens) and torch.equal(two.context()[0], tokens)
    assert one.told.tolist() == two.told.tolist() == [6]
    behind = torch.arange(5, 39)[None]
    for past in (one, two):
        found = past.target_top(behind, 8)
        assert torch.equal(found[0], said[:, 6:]) and torch.equal(found[1], sure[:, 6:])


@pytest.mark.parametrize("drafter", ["racer", "suffix"])
def test_reseated_in_float32_it_goes_on_as_the_replay(tiny_recording32, pair32, monkeypatch, drafter):
    """Every fifth cycle is taken for a difference, and the live run put where the replay stands: it must not notice."""
    compared = []

    def identical(live, recorded):
        compared.append(real(live, recorded))
        return compared[-1] and len(compared) % 5 > 0

    real = live.tandem.identical
    monkeypatch.setattr(live.tandem, "identical", identical)
    report = check_policy(open_recording(tiny_recording32), pair32, load_policy(EAGLE), drafter, 40)
    assert report.cycles == len(compared) >= 40 and all(compared)
    assert report.identical == report.cycles - report.cycles // 5 and report.largest < 1e-4


def test_a_drafter_that_hears_wrong_is_caught(tiny_recording, pair64, monkeypatch):
    """One token late: the distributions are those of the places before."""
    monkeypatch.setattr(LiveLookup, "hear", lambda self, tokens, logprobs: setattr(self, "_heard", (tokens, logprobs.roll(1, 2))))
    report = check_policy(open_recording(tiny_recording), pair64, load_policy(EAGLE), "racer", 24)
    assert report.identical < report.cycles


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_text_and_batch(tiny_pair, pair64, drafter):
    """The text is the target's own, and rows side by side decode as they do alone."""
    prompts = [[5, 6, 7, 8, 5, 6, 7], [9, 3, 9, 3, 9], [11, 12]]
    decoder = SpeculativeDecoder(pair64.target(), pair64.draft(drafter), load_policy(EAGLE), pair64.end_tokens)
    plain = SpeculativeDecoder(pair64.target(), pair64.draft(drafter), load_policy("autoregressive"), pair64.end_tokens)
    together = decoder.generate(prompts, [40, 25, 33])
    assert together.tokens == plain.generate(prompts, [40, 25, 33]).tokens
    for row, limit in enumerate([40, 25, 33]):
        alone = decoder.generate([prompts[row]], limit, sampling=Sampling(), text=torch.tensor([row]))
        assert alone.tokens == [together.tokens[row]] and alone.cycles == [together.cycles[row]]


def test_the_command(tiny_recording, capsys, refused):
    options = ["--policy", "chain(k=2)", "--drafter", "suffix(depth=4)", "--cycles", "12", "--witness", "0", "--skip-generate"]
    with pytest.raises(SystemExit) as end:
        run_command(lambda: main([str(tiny_recording), *options]))
    assert end.value.code == 0 and "suffix(depth=4)" in capsys.readouterr().out
    assert "no parameter 'dept'" in refused(lambda: main([str(tiny_recording), "--drafter", "suffix(dept=4)"]))
    assert "recording holds 8" in refused(lambda: main([str(tiny_recording), "--drafter", "racer(top=9)"]))
