"""Forwards of fixed shape give what forwards of any shape give: the same text, the same cycles, batches that shrink included."""

from __future__ import annotations

import pytest
import torch

from live.decode import SpeculativeDecoder
from live.decoding_plain import plain_decode
from live.graphed import GraphedModel, StaticTreeCache, graphed
from live.model import CachedModel
from live.sampling import GREEDY
from policies.contract import Sampling
from policies.errors import UserError
from policies.registry import load_policy

PROMPTS = [[5, 17, 40, 3, 77], [90, 12, 12, 61, 8, 30, 2], [4, 4, 9]]


def decoded(pair, spec: str, limits, sampling=GREEDY):
    """Tokens, cycles and every cycle's kept tokens of the prompts."""
    decoder = SpeculativeDecoder(pair.target(), pair.draft("eagle3"), load_policy(spec), pair.end_tokens, context_limit=128)
    steps: list = []
    done = decoder.generate(PROMPTS, limits, on_step=lambda step: steps.append(step.done.kept.token.tolist()), sampling=sampling)
    assert not done.draft_error
    return done.tokens, done.cycles, steps


@pytest.mark.parametrize("spec", ["eagle3", "eagle3(total_tokens=9, depth=3, top_k=3)", "chain(k=3)", "autoregressive"])
def test_the_same_cycles(pair64, spec):
    limits = [9, 24, 16]  # texts end one after the other, so the batch shrinks
    assert decoded(graphed(pair64, 128), spec, limits) == decoded(pair64, spec, limits)


def test_the_same_sampled_text(pair64):
    heat = Sampling(temperature=1.0, top_p=0.9, seed=3)
    assert decoded(graphed(pair64, 128), "eagle3", 20, heat) == decoded(pair64, "eagle3", 20, heat)


def test_plain_decoding(pair64):
    fixed = GraphedModel(pair64.model, 3, 128)
    assert plain_decode(fixed, PROMPTS, 16, (8,)) == plain_decode(CachedModel(pair64.model), PROMPTS, 16, (8,))


def test_numbers_are_the_same_to_the_last_bits(pair64):
    tokens = torch.tensor([[5, 17, 40, 3, 77]])
    sees = torch.tensor([[[1, 0, 0], [0, 1, 0], [1, 0, 1]]], dtype=torch.bool)
    found = []
    for model in (GraphedModel(pair64.model, 1, 64, pair64.captured), CachedModel(pair64.model, 1, 64, pair64.captured)):
        model.prefill(tokens, logits="none")
        found.append(model.forward_tree(torch.tensor([[8, 9, 10]]), None, torch.tensor([[5, 5, 6]]), sees))
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=0, atol=1e-11)


def test_a_tree_beyond_the_largest_bucket_runs_as_it_is(pair64):
    small = GraphedModel(pair64.model, 1, 128, pair64.captured, buckets=(1, 2))
    small.prefill(torch.tensor([PROMPTS[0]]), logits="none")
    output = small.forward_tree(torch.tensor([[8, 9, 10]]), None, torch.tensor([[5, 5, 5]]), torch.eye(3, dtype=torch.bool)[None])
    assert output.logits.shape[1] == 3 and not small._fixed


def test_addresses_stay_and_the_capacity_is_a_limit(pair64):
    cache = StaticTreeCache(pair64.model, 2, 16, torch.device("cpu"))
    address = cache.layers[0].keys.data_ptr()
    cache.gather(torch.tensor([1]))
    assert cache.layers[0].keys.data_ptr() != address
    cache.clear(2)
    assert cache.layers[0].keys.data_ptr() == address
    with pytest.raises(UserError, match="capacity"):
        GraphedModel(pair64.model, 1, 64).prefill(torch.ones((1, 65), dtype=torch.int64))
