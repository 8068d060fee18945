"""Draft networks: trees over a shared text, trees over rows of their own, and all of it from scratch agree."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from live.distribution import Ranked, on_grid
from live.drafter import _joined
from live.eagle3 import Eagle3Head
from live.eagle_network import EagleNetwork
from live.network import Ancestry
from live.pair import Pair
from tests.live.dense import head_logprob, model_logprob

WIDTH = 5
CONTEXTS = torch.tensor([3, 7, 4, 11])
# Three levels: children of the root, then of slots 1 and 2, then of slots 4 and 1; tokens are drawn per tree.
LEVELS = ([0, 0, 0], [1, 2], [4, 1])


class Grown(NamedTuple):
    """Children of the root and of every grown node, and the path of tokens that leads to each, per tree."""

    index: Tensor  # [B, 1 + 7, WIDTH]
    logprob: Tensor
    entropy: Tensor
    paths: list[list[list[int]]]


def grow(network, source: Tensor, contexts: Tensor, tokens: Tensor, padded: tuple[int, int] | None = None) -> Grown:
    """Grow LEVELS over ``contexts``; ``tokens`` int64 [B, 7]; ``padded`` = (tree, node) that is left out."""
    first = network.open(source, contexts, WIDTH)
    answers = [Ranked(first.index[:, None], first.logprob[:, None], first.entropy[:, None])]
    paths = [[[]] for _ in contexts]
    start = 0
    for parents in LEVELS:
        token = tokens[:, start : start + len(parents)].clone()
        for tree, known in enumerate(paths):
            known += [known[parent] + [int(token[tree, place])] for place, parent in enumerate(parents)]
        if padded and start <= padded[1] < start + len(parents):
            token[padded[0], padded[1] - start] = -1
        answers.append(network.grow(torch.tensor(parents).expand(len(contexts), -1), token, WIDTH))
        start += len(parents)
    columns = (torch.cat([getattr(answer, name) for answer in answers], dim=1) for name in Ranked._fields)
    return Grown(*columns, paths)


@pytest.fixture(scope="module")
def material(pair64: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """A random text int64 [1, 14], the target's features of it [1, 14, F], and tokens for the trees [4, 7]."""
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(4, 150, (1, 14), generator=draw)
    target = pair64.target()
    return text, target.prefill(text, logits="none").captured, torch.randint(4, 150, (4, 7), generator=draw)


def shared(network, text: Tensor, features: Tensor) -> Tensor:
    """The recorder's way: one text, trees at many places of it. Sources of the trees at CONTEXTS."""
    network.reset(1)
    with torch.inference_mode():
        count = torch.tensor([text.shape[1]])
        if network.needs_features:
            return network.advance(text[:, 1:], features[:, :-1], count - 1, everywhere=True)[0][CONTEXTS - 1]
        return network.advance(text, None, count, everywhere=True)[0][CONTEXTS]


def rows(network, text: Tensor, features: Tensor, contexts: Tensor) -> Tensor:
    """The live way: a row for each tree that ends at its root; fed in two pieces of different lengths."""
    network.reset(len(contexts))
    shift = 1 if network.needs_features else 0
    counts = contexts + 1 - shift
    first = torch.tensor([1, 2, 3, 5])[: len(contexts)].minimum(counts - 1)
    tokens, before = text[:, shift:].expand(len(contexts), -1), features.expand(len(contexts), -1, -1)
    with torch.inference_mode():
        network.advance(tokens[:, :5], before[:, :5], first)
        place = (first[:, None] + torch.arange(10)).clamp(max=tokens.shape[1] - 1)
        late = before.gather(1, place[:, :, None].expand(-1, -1, before.shape[2]))
        return network.advance(tokens.gather(1, place), late, counts - first)


def close(one: Grown, other: Grown, rows: slice | Tensor = slice(None)) -> bool:
    same = torch.equal(one.index, other.index[rows])
    near = torch.allclose(one.logprob, other.logprob[rows], atol=1e-6)
    return same and near and torch.allclose(one.entropy, other.entropy[rows], atol=1e-6)


@pytest.mark.parametrize("name", ["eagle3", "draft"])
def test_shared_text_rows_and_scratch_agree(pair64, material, name):
    text, features, tokens = material
    network = pair64.networks[name]
    with torch.inference_mode():
        together = grow(network, shared(network, text, features), CONTEXTS, tokens)
        alone = grow(network, rows(network, text, features, CONTEXTS), CONTEXTS, tokens)
    assert close(together, alone)
    for tree, context in enumerate(CONTEXTS.tolist()):
        for node, path in enumerate(together.paths[tree]):
            if name == "eagle3":
                dense = head_logprob(network.head, features[0, :context], text[0, : context + 1], path)
            else:
                dense = model_logprob(network.model.model, text[0, : context + 1], path)
            best = dense.float().sort(descending=True, stable=True)
            index = best.indices[:WIDTH]
            if name == "eagle3":  # the head numbers its own vocabulary
                index = index + network.head.d2t[index]
            assert together.index[tree, node].tolist() == index.tolist()
            assert torch.equal(together.logprob[tree, node], on_grid(best.values[:WIDTH]))
            assert together.entropy[tree, node] == on_grid(-(dense.exp() * dense).sum().float())


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_heads_may_share_their_keys_or_not(pair64, material, groups):
    """Grouped queries, a key of its own for each head (Vicuna's checkpoints), and one for all."""
    text, features, tokens = material
    given = pair64.networks["eagle3"].head
    torch.manual_seed(groups)
    config = replace(given.config, num_attention_heads=4, num_key_value_heads=groups)
    head = Eagle3Head(config, given.embed_tokens).to(given.fc.weight.dtype).eval().requires_grad_(False)
    network = EagleNetwork(head)
    with torch.inference_mode():
        together = grow(network, shared(network, text, features), CONTEXTS, tokens)
        alone = grow(network, rows(network, text, features, CONTEXTS), CONTEXTS, tokens)
    assert close(together, alone)


def test_nodes_of_a_level_may_attend_in_turns(pair64, material, monkeypatch):
    text, features, tokens = material
    network = pair64.networks["eagle3"]
    with torch.inference_mode():
        together = grow(network, shared(network, text, features), CONTEXTS, tokens)
        monkeypatch.setattr("live.eagle_trees.IN_CACHE", 1)
        assert close(grow(network, shared(network, text, features), CONTEXTS, tokens), together)


@pytest.mark.parametrize("name", ["eagle3", "draft"])
def test_padding_in_a_level_disturbs_nobody(pair64, material, name):
    text, features, tokens = material
    network = pair64.networks[name]
    with torch.inference_mode():
        whole = grow(network, shared(network, text, features), CONTEXTS, tokens)
        holed = grow(network, shared(network, text, features), CONTEXTS, tokens, padded=(1, 2))  # tree 1 lacks slot 3
    keep = [node for node in range(8) if node != 3]
    assert torch.equal(holed.index[:, keep], whole.index[:, keep])
    assert torch.allclose(holed.logprob[:, keep], whole.logprob[:, keep], atol=1e-6)


@pytest.mark.parametrize("name", ["eagle3", "draft"])
def test_rows_leave(pair64, material, name):
    text, features, tokens = material
    network, stay = pair64.networks[name], torch.tensor([3, 1])
    with torch.inference_mode():
        all_four = grow(network, rows(network, text, features, CONTEXTS), CONTEXTS, tokens)
        source = rows(network, text, features, CONTEXTS)
        network.gather_rows(stay)
        assert close(grow(network, source[stay], CONTEXTS[stay], tokens[stay]), all_four, stay)


def test_drafted_tokens_are_the_targets(pair64, material):
    """The head proposes only tokens that its vocabulary maps to, under the target's numbers."""
    text, features, _ = material
    network = pair64.networks["eagle3"]
    found = network.open(shared(network, text, features), CONTEXTS, network.head.config.draft_vocab_size)
    assert bool(network.head.t2d[found.index].all())
    assert found.index.sort(dim=-1).values.diff().min() > 0


def test_ancestry():
    kin = Ancestry(1, torch.device("cpu"), room=2)  # it grows

    def seen(*parents: int) -> list[list[int]]:
        return [row.nonzero()[:, 0].tolist() for row in kin.add(torch.tensor([parents]))[0]]

    assert seen(0, 0) == [[1], [2]]
    assert seen(2, 0) == [[2, 3], [4]]
    assert seen(3, 4) == [[2, 3, 5], [4, 6]]
    assert kin.depth.tolist() == [[0, 1, 1, 2, 1, 3, 2]]


@pytest.mark.parametrize("parents, straight", [([0, 1, 2], True), ([0, 1, 1], False), ([0, 0, 2], False)])
def test_a_chain_is_known_for_one(parents, straight):
    kin = Ancestry(2, torch.device("cpu"))
    for parent in parents:
        kin.add(torch.tensor([[parent], [parent]]))
    assert kin.straight == straight


@pytest.mark.parametrize("name", ["eagle3", "draft"])
def test_a_chain_needs_no_mask(pair64, material, name):
    """A single row's chain, which goes without a mask, answers as the same chain does inside a batch."""
    text, features, tokens = material
    network = pair64.networks[name]
    answers = []
    for which in (CONTEXTS[:1], CONTEXTS):
        source = rows(network, text, features, which)
        with torch.inference_mode():
            found = [network.open(source, which, WIDTH)]
            for slot in range(3):
                parent = torch.full((len(which), 1), slot)
                found.append(network.grow(parent, tokens[: len(which), slot : slot + 1], WIDTH))
        answers.append(torch.stack([answer.logprob.reshape(len(which), WIDTH)[0] for answer in found]))
    assert torch.allclose(*answers, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3])
def test_what_cycles_committed_is_joined_row_by_row(rows):
    """A row that is alone now may have committed beside others: then it is padded, too."""
    draw = torch.Generator().manual_seed(0)
    for cycles in (1, 2, 4):
        pieces, wanted = [], [([], []) for _ in range(rows)]
        for width in torch.randint(1, 5, (cycles,), generator=draw).tolist():
            counts = torch.randint(1, width + 1, (rows,), generator=draw)
            tokens = torch.randint(0, 99, (rows, width), generator=draw)
            tokens = tokens.masked_fill(torch.arange(width) >= counts[:, None], -1)
            features = torch.rand(rows, width, 3, generator=draw)
            pieces.append((tokens, features, counts))
            for row, count in enumerate(counts.tolist()):
                wanted[row][0].extend(tokens[row, :count].tolist())
                wanted[row][1].extend(features[row, :count].tolist())
        tokens, features, counts = _joined(pieces)
        for row, count in enumerate(counts.tolist()):
            assert (tokens[row, :count].tolist(), features[row, :count].tolist()) == wanted[row]
        assert _joined([(one, None, many) for one, _, many in pieces])[1] is None
