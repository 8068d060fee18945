"""One request on a CPU is decided by the host, many by tensors: both decide alike."""

from __future__ import annotations

import pytest
import torch

from live.verifier import sees_ancestors
from policies.order import NONE, best
from policies.tree import Children, DraftTree
from policies.verification import Kept, node_status, pack, walk


def twice(values: torch.Tensor) -> torch.Tensor:
    """The same row two times: the code for many rows decides."""
    return values.repeat(2, *[1] * (values.dim() - 1))


def grown(seed: int, copies: int, gaps: bool) -> DraftTree:
    """A tree of three levels of equal rows, with children missing here and there if ``gaps``."""
    numbers = torch.Generator().manual_seed(seed)
    tree = DraftTree(torch.full((copies,), 3))
    for level in range(3):
        nodes = tree.frontier(1 + level)
        token = torch.randint(0, 6, (1, nodes.shape[1], 3), generator=numbers).argsort(-1)  # siblings differ
        logprob = -torch.randint(0, 3, token.shape, generator=numbers).float()  # many scores tie
        if gaps:
            nothing = torch.rand(token.shape, generator=numbers) < 0.3
            token, logprob = token.masked_fill(nothing, NONE), logprob.masked_fill(nothing, -torch.inf)
        nothing = (nodes[:1] < 0)[:, :, None]
        token, logprob = token.masked_fill(nothing, NONE), logprob.masked_fill(nothing, -torch.inf)
        token, logprob = token.repeat(copies, 1, 1), logprob.repeat(copies, 1, 1)
        tree.append(nodes, Children(token, logprob, torch.zeros(token.shape[:2]), token))
    return tree


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_both_decide_alike(seed, gaps):
    one, two = grown(seed, 1, gaps), grown(seed, 2, gaps)
    for name in ("token", "parent", "depth", "rank", "score"):
        assert torch.equal(twice(getattr(one, name)), getattr(two, name))
    for count in (1, 2, 5, 50):
        assert torch.equal(twice(one.frontier(count)), two.frontier(count))
    numbers = torch.Generator().manual_seed(100 + seed)
    kept = one.exists.clone()
    for node in range(1, one.width):  # some nodes and what hangs on them are dropped
        kept[0, node] &= bool(kept[0, one.parent[0, node]]) and float(torch.rand((), generator=numbers)) < 0.8
    mine, theirs = pack(one, kept), pack(two, twice(kept))
    assert torch.equal(twice(sees_ancestors(mine)), sees_ancestors(theirs))
    taken = torch.randint(0, mine.token.shape[1], mine.token.shape, generator=numbers)
    follow = torch.where(torch.rand(mine.token.shape, generator=numbers) < 0.8, mine.token.gather(1, taken), 99)
    for place in range(mine.token.shape[1]):  # mostly what a child says
        children = [child for child in range(mine.token.shape[1]) if int(mine.parent[0, child]) == place]
        if children and float(torch.rand((), generator=numbers)) < 0.8:
            follow[0, place] = mine.token[0, children[-1]]
    for ended in (False, True):
        choice = follow.clone()
        if ended:
            choice[0, int(walk(mine, follow).path[0, 0]) if walk(mine, follow).accepted else 0] = NONE
        own, other = walk(mine, choice), walk(theirs, twice(choice))
        assert all(torch.equal(twice(a), b) and a.dtype == b.dtype for a, b in zip(own, other, strict=True))
        status = node_status(one, mine, own)
        assert torch.equal(twice(status), node_status(two, theirs, other)) and status.dtype == torch.int8


def test_padding_of_a_single_row_is_nobody():
    """A row taken out of a wider batch: behind its own nodes lies padding."""
    row = [torch.tensor([part]) for part in ([0, 2, -1], [3, 7, -1], [-1, 0, -1], [0, 1, -1])]
    kept = Kept(*row, torch.tensor([1]))
    outcome = walk(kept, torch.tensor([[7, 5, -1]]))
    assert outcome.path.tolist() == [[1]] and outcome.bonus.tolist() == [5]


@pytest.mark.parametrize("count", [1, 3, 9, 40])
def test_the_best_of_one_row(count):
    numbers = torch.Generator().manual_seed(count)
    score = -torch.randint(0, 4, (1, 20), generator=numbers).float()
    score[0, ::5] = -torch.inf
    score[0, 1] = -0.0
    assert torch.equal(twice(best(score, count)), best(twice(score), count))
    assert torch.equal(twice(best(score[:, :1], count)), best(twice(score[:, :1]), count))


def test_a_broken_score_is_ranked_as_among_others():
    score = torch.tensor([[-1.0, torch.nan, -0.5, -2.0]])
    assert torch.equal(twice(best(score, 2)), best(twice(score), 2))
