"""CachedModel: trees, ragged rows and packed positions give what one causal pass gives."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from live.cache import TreeCache
from live.decode import SpeculativeDecoder
from live.model import CachedModel
from live.pair import Pair
from policies.errors import UserError
from policies.lookup.rule import load_rule
from policies.registry import load_policy
from tests.live.tiny import FAMILIES, build, path_logits, random_tree

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-3}


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return got.shape == want.shape and bool((got - want).abs().max() < TOLERANCE[got.dtype])


def texts(gen: torch.Generator, lengths: list[int]) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Random texts, and the same padded [R, L] with counts [R]."""
    rows = [torch.randint(0, 90, (n,), generator=gen) for n in lengths]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=3)
    return rows, padded, torch.tensor(lengths)


@torch.no_grad()
def causal(model, text: torch.Tensor) -> torch.Tensor:
    return model(input_ids=text[None]).logits[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", FAMILIES)
def test_trees_on_ragged_rows_equal_paths_and_commit_goes_on(family, dtype):
    model = build(family, dtype)
    gen = torch.Generator().manual_seed(1)
    rows, padded, counts = texts(gen, [9, 4, 6])
    cached = CachedModel(model, rows=3, capacity=8, layers_to_capture=(0, 2))
    last = cached.prefill(padded, counts).logits
    for row, text in enumerate(rows):
        assert close(last[row, 0], causal(model, text)[-1])
    for _ in range(2):  # the second round grows the cache and starts from committed trees
        trees = [random_tree(gen, 7) for _ in rows]
        tokens = torch.stack([tree[1] for tree in trees])
        positions = cached.lengths[:, None] + torch.stack([tree[2] for tree in trees])
        sees = torch.stack([tree[3] for tree in trees])
        parts = [
            cached.forward_tree(tokens[:, a:b], None, positions[:, a:b], sees[:, a:b, :b]).logits
            for a, b in ((0, 1), (1, 4), (4, 7))
        ]
        got = torch.cat(parts, 1)
        assert cached.tree_size == 7
        slots, taken = torch.full((3, 4), -1), torch.zeros(3, dtype=torch.int64)
        for row, (parents, row_tokens, depth, row_sees) in enumerate(trees):
            assert close(got[row], path_logits(model, rows[row], parents, row_tokens))
            path = row_sees[int(depth.argmax())].nonzero()[:4, 0] if row != 1 else torch.tensor([], dtype=torch.int64)
            slots[row, : len(path)], taken[row] = path, len(path)
            rows[row] = torch.cat([rows[row], row_tokens[path]])
        cached.commit(slots, taken)
        assert cached.lengths.tolist() == [len(text) for text in rows] and cached.tree_size == 0
    more = torch.randint(0, 90, (3, 3), generator=gen)
    out = cached.prefill(more, torch.tensor([3, 1, 2]), logits="all")
    for row, n in enumerate((3, 1, 2)):
        whole = torch.cat([rows[row], more[row, :n]])
        assert close(out.logits[row, :n], causal(model, whole)[-n:])


@pytest.mark.parametrize("family", FAMILIES)
def test_one_row_commits_and_packs_positions(family):
    """Recorder's use: trees at many positions of one text, packed in one row, each seeing its own prefix."""
    model = build(family, torch.float64)
    gen = torch.Generator().manual_seed(2)
    text = torch.randint(0, 90, (12,), generator=gen)
    cached = CachedModel(model, capacity=4)
    cached.prefill(text[None], logits="none")
    starts, size = [3, 7, 12], 4
    trees = [random_tree(gen, size) for _ in starts]
    total = size * len(starts)
    sees = torch.zeros(1, total, total, dtype=torch.bool)
    for k, tree in enumerate(trees):
        sees[0, k * size : (k + 1) * size, k * size : (k + 1) * size] = tree[3]
    tokens = torch.cat([tree[1] for tree in trees])[None]
    prefix = torch.tensor(starts).repeat_interleave(size)[None]
    positions = prefix + torch.cat([tree[2] for tree in trees])
    halves = [
        cached.forward_tree(tokens[:, a:b], prefix[:, a:b], positions[:, a:b], sees[:, a:b, :b]).logits[0]
        for a, b in ((0, 5), (5, total))
    ]
    got = torch.cat(halves)
    for k, (start, tree) in enumerate(zip(starts, trees, strict=True)):
        assert close(got[k * size : (k + 1) * size], path_logits(model, text[:start], tree[0], tree[1]))
    cached.drop_tree()
    out = cached.prefill(tokens[:, :1], logits="last").logits[0, 0]
    assert close(out, causal(model, torch.cat([text, tokens[0, :1]]))[-1])


def test_packed_ragged_rows_with_prefixes():
    model = build("llama", torch.float64)
    gen = torch.Generator().manual_seed(3)
    rows, padded, counts = texts(gen, [9, 5])
    cached = CachedModel(model, rows=2)
    cached.prefill(padded, counts, logits="none")
    tokens = torch.randint(0, 90, (2, 3), generator=gen)
    prefix = torch.tensor([[2, 9, 4], [5, 1, 0]])
    out = cached.forward_tree(tokens, prefix, prefix, torch.eye(3, dtype=torch.bool).expand(2, 3, 3)).logits
    for r in range(2):
        for j in range(3):
            whole = torch.cat([rows[r][: prefix[r, j]], tokens[r, j : j + 1]])
            assert close(out[r, j], causal(model, whole)[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_equals_hidden_states(family):
    model = build(family, torch.float64)
    gen = torch.Generator().manual_seed(4)
    rows, padded, counts = texts(gen, [6, 3])
    layers = (0, 2, 1, 3)
    cached = CachedModel(model, rows=2, layers_to_capture=layers)
    captured = cached.prefill(padded, counts, logits="none").captured
    tail = torch.randint(0, 90, (2, 1), generator=gen)
    after = cached.forward_tree(tail, None, cached.lengths[:, None], torch.ones(2, 1, 1, dtype=torch.bool)).captured
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())  # nothing stays on the model
    normed = []
    norm = next(m for n, m in model.named_modules() if n.split(".")[-1] in ("norm", "ln_f", "final_layer_norm"))
    handle = norm.register_forward_pre_hook(lambda _, args: normed.append(args[0]))
    for row, text in enumerate(rows):
        normed.clear()
        with torch.no_grad():
            whole = torch.cat([text, tail[row]])[None]
            states = model(input_ids=whole, output_hidden_states=True).hidden_states
        want = torch.cat([*(states[i] for i in layers[:3]), normed[0]], -1)[0]
        assert close(captured[row, : len(text)], want[:-1])
        assert close(after[row], want[-1:])
    handle.remove()


def test_rows_join_and_leave():
    model = build("qwen3", torch.float64)
    gen = torch.Generator().manual_seed(5)
    rows, padded, counts = texts(gen, [5, 8, 2])
    cached = CachedModel(model, rows=3, capacity=4)
    cached.prefill(padded, counts, logits="none")
    cached.gather_rows(torch.tensor([2, -1, 0]))
    assert cached.lengths.tolist() == [2, 0, 5] and cached.rows == 3
    new = torch.randint(0, 90, (3, 4), generator=gen)
    out = cached.prefill(new, torch.tensor([1, 4, 0])).logits
    assert close(out[0, 0], causal(model, torch.cat([rows[2], new[0, :1]]))[-1])
    assert close(out[1, 0], causal(model, new[1])[-1])
    assert cached.lengths.tolist() == [3, 4, 5]
    out = cached.prefill(new[:, :1]).logits
    assert close(out[2, 0], causal(model, torch.cat([rows[0], new[2, :1]]))[-1])
    cached.reset(1)
    assert close(cached.prefill(new[:1], logits="all").logits[0], causal(model, new[0]))


def test_a_failed_row_leaves_nothing_behind():
    """NaN in the cache of one text must not reach the next through masked slots."""
    model = build("llama", torch.float32)
    cached = CachedModel(model, rows=2, capacity=16)
    text = torch.arange(6)[None].expand(2, 6)
    cached.prefill(text)
    for layer in cached.cache.layers:
        layer.keys.fill_(float("nan"))
        layer.values.fill_(float("nan"))
    cached.reset()
    assert cached.prefill(text[:, :2], torch.tensor([2, 1])).logits.isfinite().all()
    tree = cached.forward_tree(text[:, :1], None, torch.tensor([[2], [1]]), torch.ones(2, 1, 1, dtype=torch.bool))
    assert tree.logits.isfinite().all()  # the shorter row is shown a slot that nothing has written since
    cached.drop_tree()
    cached.gather_rows(torch.tensor([0, -1]))
    assert cached.prefill(text[:, :2], torch.tensor([1, 2])).logits.isfinite().all()


def test_rows_join_where_a_layer_keeps_nothing():
    """Layers without attention, or that read another layer's keys, never write to the cache."""
    both = []
    for rows in (1, 2):
        cache = TreeCache(rows, 4, layers=2, device=torch.device("cpu"))
        cache.open(3)
        states = torch.full((rows, 1, 3, 2), float(rows))
        cache.layers[0].update(states, states)
        cache.extend([3] * rows)
        both.append(cache)
    both[0].join(both[1])
    assert both[0].lengths.tolist() == [3, 3, 3] and both[0].layers[0].keys[:, 0, 0, 0].tolist() == [1, 2, 2]
    assert both[0].layers[1].keys is None


def test_work_per_commit_does_not_grow_with_context(monkeypatch):
    model = build("llama", torch.float32, max_position_embeddings=2000)
    cached = CachedModel(model, capacity=1200)
    moved = []
    real = torch.Tensor.index_select
    monkeypatch.setattr(torch.Tensor, "index_select", lambda *a: moved.append(out := real(*a)) or out)
    for context in (10, 1000):
        cached.reset()
        cached.prefill(torch.zeros(1, context, dtype=torch.int64), logits="none")
        sees = torch.ones(1, 4, 4, dtype=torch.bool).tril()
        cached.forward_tree(torch.ones(1, 4, dtype=torch.int64), None, context + torch.arange(4)[None], sees)
        cached.commit(torch.tensor([[0, 2, 3, -1]]), torch.tensor([3]))
    assert {tensor.shape[3] for tensor in moved} == {2} and len(moved) == 2  # slot 0 stands where it belongs


def test_memory_is_given_back_at_once():
    """Keys and values go with their model, not only when Python searches for cycles: a server makes many of them."""
    cached = CachedModel(build("llama"), rows=2)
    cached.prefill(torch.tensor([[1, 2], [3, 4]]), torch.tensor([2, 2]))
    keys = weakref.ref(cached.cache.layers[0].keys)
    assert keys() is not None
    gc.disable()
    try:
        del cached
        assert keys() is None
    finally:
        gc.enable()


def test_wrong_calls_are_refused():
    cached = CachedModel(build("llama"))
    cached.prefill(torch.zeros(1, 3, dtype=torch.int64))
    one = torch.ones(1, 1, dtype=torch.int64)
    cached.forward_tree(one, None, 3 * one, one[None].bool())
    with pytest.raises(ValueError, match="empty tree"):
        cached.prefill(one)
    with pytest.raises(ValueError, match="outside the tree"):
        cached.commit(torch.tensor([[1]]), torch.tensor([1]))
    with pytest.raises(ValueError, match="columns"):
        cached.forward_tree(one, None, 4 * one, one[None].bool())
    assert cached.tree_size == 1 and cached.lengths.tolist() == [3]


def test_context_limits():
    cached = CachedModel(build("mistral", sliding_window=8))
    with pytest.raises(UserError, match="sliding window"):
        cached.prefill(torch.zeros(1, 9, dtype=torch.int64))
    assert cached.lengths.tolist() == [0]
    cached.prefill(torch.zeros(1, 7, dtype=torch.int64))
    wide = torch.full((1, 5), 7)
    cached.forward_tree(wide, None, wide, torch.eye(5, dtype=torch.bool)[None])  # 12 slots, but positions up to 7
    with pytest.raises(UserError, match="sliding window"):
        cached.forward_tree(wide[:, :1], None, wide[:, :1] + 1, torch.ones(1, 1, 6, dtype=torch.bool))
    pair = Pair(cached.model, None, {}, (), {"context_limit": 8})
    window = "the model's sliding window, within which trees are exact, holds 8"
    with pytest.raises(UserError, match=window):
        SpeculativeDecoder(cached, load_rule("suffix"), load_policy("chain")).generate([[1] * 9], 4)
    assert f"{pair.context_holder} holds {pair.context_limit}" == window
    short = CachedModel(build("gpt2", n_positions=8, max_position_embeddings=8), rows=2)
    short.prefill(torch.zeros(2, 8, dtype=torch.int64), torch.tensor([4, 8]))
    short.reset()
    short.prefill(torch.zeros(2, 6, dtype=torch.int64), torch.tensor([3, 6]))
    short.prefill(torch.zeros(2, 4, dtype=torch.int64), torch.tensor([4, 1]))  # padding reaches past position 7


@pytest.mark.parametrize("family", ["mamba", "qwen3_next", "bloom", "t5"])
def test_unsupported_families_are_refused_by_name(family):
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    small = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    extra = {"t5": {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}}
    more = {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    }
    config = CONFIG_MAPPING[family](**extra.get(family, small | (more if family == "qwen3_next" else {})))
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    model = auto.from_config(config)
    with pytest.raises(UserError, match=type(model).__name__):
        CachedModel(model)


def test_the_standing_mask_is_what_a_new_one_would_be():
    """Cycle after cycle, whatever the trees before left in it; where it stands still, its memory does too."""
    model, gen = build("llama", torch.float64), torch.Generator().manual_seed(6)
    cached = CachedModel(model, rows=2, capacity=64)
    cached.prefill(torch.randint(0, 90, (2, 9), generator=gen), logits="none")
    places = set()
    for width, taken in ((5, 2), (3, 1), (7, 3), (2, 2), (6, 1)):
        text = cached.cache.longest
        sees = torch.rand(2, width, width, generator=gen) < 0.5
        sees |= torch.eye(width, dtype=torch.bool)
        mask = cached._tree_mask(None, sees)
        visible = torch.cat([torch.ones(2, width, text, dtype=torch.bool), sees], 2)
        assert torch.equal(mask[:, 0] == 0, visible) and bool((mask[:, 0][~visible] == cached._hidden).all())
        places.add(mask.data_ptr())
        cached.forward_tree(torch.zeros(2, width, dtype=torch.int64), None, torch.full((2, width), text), sees)
        cached.commit(torch.arange(taken).expand(2, -1), torch.full((2,), taken))
    assert len(places) <= 2  # one for five tokens, a larger one from seven on


def test_grouped_heads_are_asked_for_within_a_masked_forward_alone(monkeypatch):
    import os

    switch, seen = "TRANSFORMERS_SDPA_FORCE_GQA", []
    monkeypatch.delenv(switch, raising=False)
    cached = CachedModel(build("llama", torch.float64))
    handle = cached.model.register_forward_pre_hook(lambda *_: seen.append(os.environ.get(switch)))
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    cached.prefill(tokens)
    cached.forward_tree(tokens, None, torch.full((1, 2), 2), torch.eye(2, dtype=torch.bool)[None])
    handle.remove()
    assert seen == [None, "1"] and switch not in os.environ
