"""The tree's columns, whatever its drafter's answers are made of."""

from __future__ import annotations

import pytest
import torch

from policies.children import Children, ChildTable, StoredChildren
from policies.tree import DraftTree

COLUMNS = ("token", "parent", "depth", "rank", "logprob", "score", "expanded", "entropy", "topk_entropy")
NEEDS = frozenset({"entropy", "topk_entropy"})
ROWS, FANOUT = 5, 3
INF = float("inf")


def table(expansions: int = 40) -> ChildTable:
    source = torch.Generator().manual_seed(1)
    logprob = -torch.randint(1, 9, (expansions, FANOUT), generator=source).float().cumsum(1) / 4  # many ties
    return ChildTable(
        torch.randint(0, 100, (expansions, FANOUT), generator=source, dtype=torch.int32),
        logprob,
        torch.rand(expansions, generator=source),
    )


def answer(held: ChildTable, row: torch.Tensor) -> StoredChildren:
    logprob = held.logprob[row.clamp(min=0)].masked_fill(row[:, :, None] < 0, -INF)
    return StoredChildren(held, row, logprob, None)


def grow(levels_read: list[bool], gaps: bool) -> DraftTree:
    """A tree of three levels; the levels marked True come as plain tensors instead of rows of a table."""
    held, source = table(), torch.Generator().manual_seed(2)
    tree = DraftTree(torch.arange(ROWS), NEEDS)
    for read in levels_read:
        nodes = tree.root_nodes() if tree.levels == 0 else tree.frontier(2)
        row = torch.randint(0, 40, nodes.shape, generator=source)
        if gaps and tree.levels:
            nodes = nodes.masked_fill((torch.arange(ROWS) % 3 == tree.levels)[:, None], -1)
        row = row.masked_fill(nodes < 0, -1)
        children = answer(held, row)
        tree.append(nodes, children.read() if read else children)
    return tree


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("levels_read", [[False] * 3, [False, False, True], [True, False, False], [False, True, False]])
def test_stored_children_are_plain_children(levels_read, gaps):
    plain, tree = grow([True] * 3, gaps), grow(levels_read, gaps)
    assert torch.equal(plain.size, tree.size) and (len(set(plain.size.tolist())) > 1) == gaps
    for name in COLUMNS:
        assert torch.equal(getattr(plain, name), getattr(tree, name)), name
    drafted = tree.drafted()
    assert torch.equal(tree.handle[drafted], plain.handle[drafted])
    assert torch.equal(tree.frontier(4), plain.frontier(4))


@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("read", [False, True])
def test_at_reads_what_the_column_holds(read, gaps):
    tree = grow([read] * 3, gaps)
    everywhere = torch.arange(tree.width).expand(ROWS, -1).masked_fill(~tree.exists, -1)
    newest, _ = tree.newest()
    for nodes in (everywhere, newest, tree.frontier(3)):
        there = nodes >= 0
        for name in ("token", "parent", "depth", "logprob", "score", "handle"):
            wanted = getattr(tree, name).gather(1, nodes.clamp(min=0))
            assert torch.equal(tree.at(name, nodes)[there], wanted[there]), name


def test_a_policy_may_write_into_its_frontier():
    tree = grow([True] * 2, gaps=False)
    nodes = tree.frontier(2)
    assert tree.is_frontier(nodes)
    nodes[:, 0] = -1
    assert not tree.is_frontier(nodes)


def test_a_narrow_answer_leaves_gaps():
    tree = DraftTree(torch.tensor([5]))
    token, logprob = torch.tensor([[[7, -1]]]), torch.tensor([[[-0.5, -INF]]])
    tree.append(tree.root_nodes(), Children(token, logprob, torch.zeros(1, 1), token))
    assert tree.token.tolist() == [[5, 7]] and tree.size.tolist() == [2]
    assert tree.newest()[0].tolist() == [[1]] and tree.frontier(2).tolist() == [[1, -1]]
