"""Everything that runs beside a model runs on the model's device: watched on the CPU, as tests/live/host_watch.py explains."""

from __future__ import annotations

import pytest
import torch

from live.decode import SpeculativeDecoder
from live.decoding_plain import plain_decode
from live.graphed_pair import graphed
from policies.contract import Sampling
from policies.registry import load_policy
from tests.live.host_watch import HostWatch
from tests.policies.cases import make, settings
from traces.analytic import analytic_profile

PROMPTS = [[5, 17, 40, 3, 77], [90, 12, 12, 61, 8, 30, 2]]
COST = analytic_profile("h100", "llama-3.1-8b").cost("eagle3")
SAMPLINGS = (Sampling(), Sampling(temperature=1.0, top_p=0.9, top_k=40, repetition_penalty=1.1, seed=3))


def test_the_watch_notices_what_a_gpu_would_refuse():
    device, values = torch.device("cpu"), torch.rand(3)
    with HostWatch() as watch:
        values + torch.arange(3)
        values.scatter(0, torch.zeros(1, dtype=torch.int64) + 1, 0.0)
    assert len(watch.faults) == 2
    with HostWatch() as watch:
        values + torch.arange(3).to(device) + torch.arange(3, device=device)
        values[torch.arange(2)] * torch.tensor(2.0)
    assert not watch.faults


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_plain_decoding(pair64, sampling):
    with HostWatch() as watch:
        plain_decode(pair64.target(), PROMPTS, 6, (), sampling=sampling)
    assert not watch.faults


def first_settings() -> list[str]:
    """One setting of every policy."""
    return list({spec.partition("(")[0]: spec for spec in reversed(settings())}.values())


@pytest.mark.parametrize("drafter", ["eagle3", "draft"])
def test_decoding_with_every_policy(pair64, drafter):
    """The head in fixed shapes (live/graphed.py) and the draft model as it is."""
    specs = first_settings() if drafter == "eagle3" else ["eagle3", "chain(k=3)"]
    faults = {}
    for spec in specs:
        pair, policy = (pair64 if drafter == "draft" else graphed(pair64, 256)), make(spec)
        decoder = SpeculativeDecoder(pair.target(), pair.draft(drafter), policy, pair.end_tokens, COST, context_limit=128)
        decoder.generate(PROMPTS, 3, sampling=SAMPLINGS[1])  # tables that are made once may be made on the host
        with HostWatch() as watch:
            done = decoder.generate(PROMPTS, 6, sampling=SAMPLINGS[1])
        assert not done.draft_error
        if watch.faults:
            faults[spec] = sorted(watch.faults)
    assert not faults


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled"])
def test_recording(pair64, sampling):
    from traces.capture import CaptureSettings, TargetCapture, capture_forest, generate_texts

    cover = (load_policy("eagle3(top_k=4, depth=3)"), load_policy("static"), load_policy("chain(k=5)"))
    asked = CaptureSettings(6, 8, 12, 10, cover, False, 4)
    with torch.inference_mode(), HostWatch() as watch:
        for number, text in enumerate(generate_texts(pair64, PROMPTS, asked, sampling)):
            capture = TargetCapture(pair64.target(), text, sampling, number)
            capture.columns(12)
            for network in pair64.networks.values():
                capture_forest(network, capture, text, asked, 128)
    assert not watch.faults
