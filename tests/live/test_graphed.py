"""Forwards of fixed shape give what forwards of any shape give: the same text, the same cycles, batches that shrink included."""

from __future__ import annotations

import pytest
import torch

from live.batcher import Batcher
from live.decode import SpeculativeDecoder
from live.decoding_plain import plain_decode
from live.graphed import GraphedModel, StaticTreeCache
from live.graphed_eagle import SLOTS, GraphedEagle
from live.graphed_pair import graphed
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


def test_the_fixed_head_answers_as_the_other(pair64):
    """Fixed head and ordinary head side by side: a catch-up, two levels with padding, rows that leave, a second cycle."""
    answers = []
    for network in (pair64.networks["eagle3"], GraphedEagle(pair64.networks["eagle3"].head, "eagle3", 64)):
        draw = torch.Generator().manual_seed(1)

        def features(rows: int, count: int, draw=draw) -> torch.Tensor:
            return torch.randn(rows, count, 96, generator=draw, dtype=torch.float64)

        network.reset(3)
        counts = torch.tensor([7, 5, 6])
        source = network.advance(torch.arange(21).reshape(3, 7), features(3, 7), counts)
        for round_ in range(2):
            found = [network.open(source, counts, 3)]
            found.append(network.grow(torch.zeros_like(found[0].index), found[0].index, 3))
            token = found[1].index[:, :, 0].clone()
            token[0, 2] = -1
            found.append(network.grow(torch.tensor([[1, 2, 0]]).expand(len(token), -1), token, 2))
            answers.append(found)
            if not round_:
                kept = torch.tensor([2, 0])
                network.gather_rows(kept)
                caught = torch.tensor([3, 1])
                counts = counts[kept] + caught
                source = network.advance(torch.arange(6).reshape(2, 3), features(2, 3), caught)
    for ordinary, fixed in zip(answers[:2], answers[2:], strict=True):
        for one, other in zip(ordinary, fixed, strict=True):
            real = one.logprob.isfinite()
            assert torch.equal(one.index[real], other.index[real])
            assert torch.allclose(one.logprob, other.logprob, atol=1e-6) and torch.allclose(one.entropy, other.entropy, atol=1e-6)


def test_a_draft_tree_without_end_is_a_crash_that_decoding_survives(pair64):
    pair = graphed(pair64, 512)
    spec = "eagle3(total_tokens=8, depth=30, top_k=10)"
    decoder = SpeculativeDecoder(pair.target(), pair.draft("eagle3"), load_policy(spec), pair.end_tokens, context_limit=256)
    done = decoder.generate(PROMPTS[:1], 6)
    assert str(SLOTS) in done.draft_error and len(done.tokens[0]) == 6


def test_the_same_sampled_text(pair64):
    heat = Sampling(temperature=1.0, top_p=0.9, seed=3)
    assert decoded(graphed(pair64, 128), "eagle3", 20, heat) == decoded(pair64, "eagle3", 20, heat)


def test_plain_decoding(pair64):
    fixed = GraphedModel(pair64.model, 3, 128)
    assert plain_decode(fixed, PROMPTS, 16, (8,)) == (whole := plain_decode(CachedModel(pair64.model), PROMPTS, 16, (8,)))
    limited = plain_decode(fixed, PROMPTS, [3, 16, 7], (8,))
    assert limited == [text[:limit] for text, limit in zip(whole, (3, 16, 7), strict=True)]


def test_numbers_are_the_same_to_the_last_bits(pair64):
    tokens = torch.tensor([[5, 17, 40, 3, 77]])
    sees = torch.tensor([[[1, 0, 0], [0, 1, 0], [1, 0, 1]]], dtype=torch.bool)
    found = []
    for model in (GraphedModel(pair64.model, 1, 64, pair64.captured), CachedModel(pair64.model, 1, 64, pair64.captured)):
        model.prefill(tokens, logits="none")
        found.append(model.forward_tree(torch.tensor([[8, 9, 10]]), None, torch.tensor([[5, 5, 6]]), sees))
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=0, atol=1e-11)


def test_requests_that_join(pair64):
    said = []
    for pair in (pair64, graphed(pair64, 128)):
        decoder = SpeculativeDecoder(pair.target(), pair.draft("eagle3"), load_policy("eagle3(total_tokens=9, depth=3, top_k=3)"))
        batcher = Batcher(decoder, batch=2)
        requests = [batcher.submit(prompt, limit) for prompt, limit in zip([*PROMPTS, PROMPTS[0]], (6, 14, 9, 11), strict=True)]
        for _ in batcher.stream():
            pass
        assert not batcher.crashes
        said.append([(request.tokens, request.cycles, request.finish) for request in requests])
    assert said[0] == said[1]


def test_a_prompt_with_all_its_logits_is_no_tree(pair64):
    tokens = torch.tensor([PROMPTS[0]])
    found = [model.prefill(tokens, logits="all").logits for model in (GraphedModel(pair64.model, 1, 64), CachedModel(pair64.model))]
    assert torch.allclose(*found, rtol=0, atol=1e-11)


def test_what_a_graph_leaves_may_be_written_to_in_every_mode(pair64):
    with torch.inference_mode():
        fixed = GraphedModel(pair64.model, 1, 64, pair64.captured)
        fixed.prefill(torch.tensor([PROMPTS[0]]), logits="none")
        fixed.forward_tree(torch.tensor([[8, 9]]), None, torch.tensor([[5, 5]]), torch.eye(2, dtype=torch.bool)[None])
    for part in next(iter(fixed._shapes.values())).output:
        part.zero_()  # as a replay does from outside


def test_a_tree_beyond_the_largest_bucket_runs_as_it_is(pair64):
    small = GraphedModel(pair64.model, 1, 128, pair64.captured, buckets=(1, 2))
    small.prefill(torch.tensor([PROMPTS[0]]), logits="none")
    output = small.forward_tree(torch.tensor([[8, 9, 10]]), None, torch.tensor([[5, 5, 5]]), torch.eye(3, dtype=torch.bool)[None])
    assert output.logits.shape[1] == 3 and not small._shapes


def test_addresses_stay_and_the_capacity_is_a_limit(pair64):
    cache = StaticTreeCache(pair64.model, 2, 16, torch.device("cpu"))
    address = cache.layers[0].keys.data_ptr()
    cache.gather(torch.tensor([1]))
    assert cache.layers[0].keys.data_ptr() != address
    cache.clear(2)
    assert cache.layers[0].keys.data_ptr() == address
    with pytest.raises(UserError, match="capacity"):
        GraphedModel(pair64.model, 1, 64).prefill(torch.ones((1, 65), dtype=torch.int64))
