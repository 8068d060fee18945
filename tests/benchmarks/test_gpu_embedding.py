"""The small pair inside a large shape: the same log-probabilities, the same cycles, and rules that are missed when broken."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from benchmarks.gpu import embedding
from benchmarks.gpu.embedding import embed_head, embed_target, embedded_pair, exact_in_half, layer_places, rotary_places
from benchmarks.gpu.shapes import Shape, named_shape
from live.decode import SpeculativeDecoder
from live.distribution import entropy_of, log_probabilities
from live.eagle3 import captured_layers
from live.model import CachedModel
from policies.errors import UserError
from policies.registry import load_policy

LARGE = Shape(
    "large", hidden=128, intermediate=96, layers=9, heads=16, groups=4, head_dim=32, vocabulary=300, drafted=130, context=256
)
TEXT = torch.tensor([[5, 17, 40, 3, 77, 90, 12, 12, 61, 8, 30, 2, 99]])


@pytest.fixture(scope="module")
def large64(pair64):
    return embedded_pair(pair64, LARGE, torch.float64)


def forward(pair):
    """Logits and captured streams of the text."""
    return CachedModel(pair.model, layers_to_capture=pair.captured).prefill(TEXT, logits="all")


def difference(small, large) -> float:
    """Largest difference of log-probabilities, of the small vocabulary."""
    return float((log_probabilities(small) - log_probabilities(large)[..., : small.shape[-1]]).abs().max())


def test_the_large_target_says_what_the_small_one_says(pair64, large64):
    small, large = forward(pair64), forward(large64)
    assert large.logits.shape[-1] == 300
    assert difference(small.logits, large.logits) < 1e-10  # the bar is 1e-5
    assert bool((large.logits[..., small.logits.shape[-1] :] == -torch.inf).all())
    assert torch.allclose(entropy_of(log_probabilities(small.logits)), entropy_of(log_probabilities(large.logits)), atol=1e-6)


def test_captured_streams_are_the_small_ones_and_zeros(pair64, large64):
    assert large64.captured == captured_layers(9) == (2, 4, 6)
    small, large = (forward(pair).captured.unflatten(-1, (3, -1)) for pair in (pair64, large64))
    assert torch.allclose(small, large[..., :32], atol=1e-10) and bool((large[..., 32:] == 0).all())


def test_the_large_head_drafts_what_the_small_one_drafts(pair64, large64):
    found = []
    for pair in (pair64, large64):
        network, features = pair.networks["eagle3"], forward(pair).captured
        network.reset(1)
        count = torch.tensor([TEXT.shape[1] - 1])
        source = network.advance(TEXT[:, 1:], features[:, :-1], count)
        root = network.open(source, count, 4)
        found += [root, network.grow(torch.zeros(1, 4, dtype=torch.int64), root.index, 4)]
    for small, large in zip(found[:2], found[2:], strict=True):
        assert torch.equal(small.index, large.index)
        assert torch.allclose(small.logprob, large.logprob, atol=1e-6) and torch.allclose(small.entropy, large.entropy, atol=1e-6)


def test_both_decode_the_same_cycles(pair64, large64):
    told = []
    for pair in (pair64, large64):
        decoder = SpeculativeDecoder(pair.target(), pair.draft("eagle3"), load_policy("eagle3"), pair.end_tokens)
        steps = []
        done = decoder.generate([TEXT[0].tolist()], 24, on_step=lambda step, kept=steps: kept.append(step.done.kept.token.tolist()))
        told.append((done.tokens, done.cycles, steps))
    assert told[0] == told[1]


BREAKS = {
    "queries are not scaled": lambda large: large.model.layers[0].self_attn.q_proj.weight.mul_(0.5),
    "a query dimension that is not planted is scored": lambda large: large.model.layers[0].self_attn.q_proj.weight[1].add_(0.3),
    "an unused head is read": lambda large: large.model.layers[0].self_attn.o_proj.weight[:32, 2 * 32 : 3 * 32].add_(0.1),
    "a layer writes beyond the small width": lambda large: large.model.layers[0].mlp.down_proj.weight[40, :64].add_(0.3),
    "an unused neuron is read": lambda large: large.model.layers[0].mlp.down_proj.weight[:32, 80].add_(0.3),
    "an extra layer adds something": lambda large: large.model.layers[3].mlp.down_proj.weight.add_(0.05),
    "a norm is not scaled": lambda large: large.model.norm.weight.mul_(2.0),
    "eps is the small one's": lambda large: setattr(large.model.norm, "variance_epsilon", 1e-6),
}


@pytest.mark.parametrize("broken", BREAKS)
@torch.no_grad()
def test_every_rule_counts(pair64, broken):
    large = embed_target(pair64.model, LARGE, torch.float64, captured=pair64.captured)
    BREAKS[broken](large)
    found = difference(forward(pair64).logits, CachedModel(large).prefill(TEXT, logits="all").logits)
    assert found > 1e-8  # where it holds, they agree to 1e-10


def test_rotary_pairs_that_turn_otherwise_are_noticed(pair64, monkeypatch):
    monkeypatch.setattr(embedding, "rotary_places", lambda small, large: torch.arange(small))
    large = embed_target(pair64.model, LARGE, torch.float64, captured=pair64.captured)
    assert difference(forward(pair64).logits, CachedModel(large).prefill(TEXT, logits="all").logits) > 1e-5


def test_everything_is_multiplied(large64):
    """No matrix is thin with zeros but the two that must write nothing beyond the small width."""
    for name, weight in large64.model.named_parameters():
        if weight.ndim == 2 and not name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight")):
            assert float((weight == 0).double().mean()) < 0.5, name


def test_places():
    assert rotary_places(8, 32).tolist() == [0, 4, 8, 12, 16, 20, 24, 28]
    assert rotary_places(4, 16).tolist() == [0, 4, 8, 12]
    places = layer_places(12, (2, 6, 9), 32)
    assert places[:2] == [0, 1] and sum(place < 16 for place in places) == 6 and sum(place < 29 for place in places) == 9
    assert len(set(places)) == 12 and places == sorted(places)


def test_power_of_two_scalings_keep_every_bit_of_bfloat16(pair32):
    shape = replace(LARGE, hidden=512, name="sixteenfold")
    assert exact_in_half(pair32.model, shape) and not exact_in_half(pair32.model, replace(LARGE, hidden=96))
    small = copy.deepcopy(pair32.model).to(torch.bfloat16)  # the pair is shared, and rounding cannot be undone
    large = embed_target(small, shape, torch.bfloat16, captured=pair32.captured)
    theirs = large.model.layers[0].self_attn.q_proj.weight[rotary_places(8, 32), :32]
    assert torch.equal(theirs, small.model.layers[0].self_attn.q_proj.weight[:8] * 2)
    logits = [CachedModel(model).prefill(TEXT, logits="all").logits for model in (small, large)]
    assert difference(*logits) < 0.5 and (logits[0].argmax(-1) == logits[1][..., :160].argmax(-1)).double().mean() > 0.7


def test_what_does_not_fit_is_refused(pair64):
    for change in ({"hidden": 16}, {"head_dim": 12}, {"groups": 1}, {"vocabulary": 20}, {"layers": 5}):
        with pytest.raises(UserError):
            embed_target(pair64.model, replace(LARGE, **change), torch.float64, captured=pair64.captured)
    head = pair64.networks["eagle3"].head
    with pytest.raises(UserError):
        embed_head(head, replace(LARGE, drafted=50), torch.zeros(300, 128), torch.float64)


def test_the_shipped_pair_in_heads_of_128(shipped64):
    """All of the shipped pair's layers, in the head size and neuron ratio of LLaMA-3.1-8B at a quarter of its width."""
    shape = Shape("quarter", 1024, 1024, 16, 32, 8, 128, 6400, 4352, 2048)
    large = embedded_pair(shipped64, shape, torch.float64)
    assert difference(forward(shipped64).logits, forward(large).logits) < 1e-5
    heads = [
        pair.networks["eagle3"].head.logits(pair.networks["eagle3"].head.fuse(forward(pair).captured))
        for pair in (shipped64, large)
    ]
    assert difference(*heads) < 1e-5


@pytest.fixture(scope="module")
def shipped64():
    from live.pair import load_pair

    return load_pair("reference", ["reference/eagle3"], "float64")


@pytest.mark.long
def test_one_layer_at_full_width(shipped64):
    """Width 4096, 32 heads of 128, 14336 neurons, as LLaMA-3.1-8B has them; one layer and a reduced vocabulary for memory."""
    small = shipped64.model
    layers, small.model.layers = small.model.layers, small.model.layers[:1]
    small.config.num_hidden_layers = 1
    try:
        shape = replace(named_shape("llama-3.1-8b"), layers=1, vocabulary=6400)
        large = embed_target(small, shape, torch.float64)
        assert difference(*(CachedModel(model).prefill(TEXT, logits="all").logits for model in (small, large))) < 1e-5
    finally:
        small.model.layers, small.config.num_hidden_layers = layers, len(layers)


@pytest.mark.long
def test_the_head_at_full_width(shipped64):
    shape = replace(named_shape("llama-3.1-8b"), vocabulary=6400, drafted=4352)
    small = shipped64.networks["eagle3"].head
    embeddings = torch.zeros(6400, 4096, dtype=torch.float64)
    embeddings[:6144, :256] = small.embed_tokens
    large = embed_head(small, shape, embeddings, torch.float64)
    features = forward(shipped64).captured
    wide = torch.zeros(*features.shape[:-1], 3, 4096, dtype=torch.float64)
    wide[..., :256] = features.unflatten(-1, (3, 256))
    outputs = []
    for head, seen in ((small, features), (large, wide.flatten(-2))):
        residual, query, key, value = head.project(head.fuse(seen), TEXT, torch.arange(TEXT.shape[1])[None])
        shared = head.num_heads // head.num_kv_heads
        spread = [part.transpose(1, 2) for part in (query, key.repeat_interleave(shared, 2), value.repeat_interleave(shared, 2))]
        attended = torch.nn.functional.scaled_dot_product_attention(*spread, is_causal=True).transpose(1, 2).flatten(2)
        outputs.append(head.logits(head.finish(residual, attended)))
    assert difference(*outputs) < 1e-5
