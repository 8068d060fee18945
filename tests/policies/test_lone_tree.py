"""The tree of a request alone answers as the tree of a batch does, whatever is asked of it, and when."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from policies.children import Children, ChildTable, StoredChildren
from policies.drafting import draft
from policies.lone_tree import LoneTree, new_tree
from policies.order import NONE
from policies.tree import DraftTree
from tests.policies.cases import SETTINGS, make
from tests.policies.synthetic import Language, Priced, SyntheticDrafter, cycle_at, fresh

NEEDS = frozenset({"entropy", "topk_entropy"})
COLUMNS = ("token", "parent", "depth", "rank", "handle", "logprob", "score")


def answer(nodes: torch.Tensor, numbers: torch.Generator, kind: str) -> Children:
    """Three children each, for one row: "all", "none", or "some" of them are there."""
    shape = (1, nodes.shape[1], 3)
    token = torch.randint(0, 6, shape, generator=numbers).argsort(-1)
    logprob = -torch.randint(0, 3, shape, generator=numbers).float() / 3  # many scores tie
    handle = torch.randint(0, 99, shape, generator=numbers)
    entropy = torch.rand(shape[:2], generator=numbers)
    gone = torch.ones(shape, dtype=torch.bool) if kind == "none" else torch.rand(shape, generator=numbers) < 0.4
    if kind != "all":
        token, handle = token.masked_fill(gone, NONE), handle.masked_fill(gone, NONE)
        logprob = logprob.masked_fill(gone, -torch.inf)
    return Children(token, logprob, entropy, handle)


def repeated(children: Children) -> Children:
    return Children(*(None if part is None else part.repeat(2, *[1] * (part.dim() - 1)) for part in children))


def same(own: torch.Tensor, of_batch: torch.Tensor) -> bool:
    return torch.equal(own[0], of_batch[0]) and own.dtype == of_batch.dtype


def ask(one: DraftTree, two: DraftTree, question: str) -> None:
    """One of the things that may be asked of a tree; both answer alike."""
    some = torch.tensor([[0, one.width - 1, one.width // 2]])
    if question in COLUMNS:
        assert same(getattr(one, question), getattr(two, question))
        assert question == "rank" or same(one.at(question, some), two.at(question, some.repeat(2, 1)))
    elif question == "frontier":
        for count in (1, 2, 50):
            ours, theirs = one.frontier(count), two.frontier(count)
            real = theirs[0] >= 0  # behind them a level without nodes may have places or not
            assert torch.equal(ours[0][ours[0] >= 0], theirs[0][real])
    elif question == "level":
        assert same(one.newest_scores().flatten(1), two.newest_scores().flatten(1))
        assert one.newest_listed().score == two.newest_scores()[0].flatten().tolist()
    elif question == "listed":
        assert one.listed("token", "depth") == [two.token[0].tolist(), two.depth[0].tolist()]
    elif question == "size":
        assert int(one.size) == int(two.size[0]) and one.width == two.width and one.ragged == two.ragged
        assert same(one.exists, two.exists)
    else:
        assert same(getattr(one, question), getattr(two, question))


QUESTIONS = (*COLUMNS, "frontier", "listed", "size", "level", "expanded", "entropy", "topk_entropy")


@pytest.mark.parametrize("kinds", ["all all all all", "all none", "all all none none", "all some all", "some all", "none all"])
@pytest.mark.parametrize("seed", range(6))
def test_answers_as_in_a_batch(kinds, seed):
    numbers, shuffled = torch.Generator().manual_seed(seed), random.Random(seed)
    one, two = LoneTree(torch.tensor([3]), NEEDS), DraftTree(torch.tensor([3, 3]), NEEDS)
    for kind in kinds.split():
        ask(one, two, shuffled.choice(COLUMNS))
        nodes = two.frontier(2)
        if int(nodes.max()) < 0:
            break
        mine = one.frontier(2)
        assert torch.equal(mine, nodes[:1]) and one.is_frontier(mine)
        children = answer(mine, numbers, kind)
        one.append(mine, children)
        two.append(nodes, repeated(children))
        for question in shuffled.sample(QUESTIONS, shuffled.randint(0, 3)):
            ask(one, two, question)
    for question in shuffled.sample(QUESTIONS, len(QUESTIONS)):
        ask(one, two, question)


def test_rows_of_a_table_are_for_the_tree_of_a_batch():
    table = ChildTable(torch.tensor([[5, 6]], dtype=torch.int32), torch.tensor([[-0.5, -1.0]]), torch.tensor([0.7]))
    tree = new_tree(torch.tensor([1]), NEEDS)
    tree.append(tree.frontier(1), StoredChildren(table, torch.tensor([[0]]), table.logprob[None], None))
    assert tree.token.tolist() == [[1, 5, 6]] and tree.entropy[0, 0] == table.entropy[0]
    assert tree.frontier(1).tolist() == [[1]]


def test_only_a_request_alone_has_such_a_tree():
    assert isinstance(new_tree(torch.tensor([1]), NEEDS), LoneTree)
    assert type(new_tree(torch.tensor([1, 2]), NEEDS)) is DraftTree


def test_what_a_policy_did_not_ask_for_is_refused_by_name():
    tree = LoneTree(torch.tensor([1]))
    for _ in range(2):  # as such, and as the tree of a batch
        with pytest.raises(AttributeError, match="reads tree.entropy but does not name it"):
            _ = tree.entropy
        with pytest.raises(AttributeError, match="no attribute 'entropies'"):
            _ = tree.entropies


def test_float32_sums():
    """Scores are sums in float32, also where those are rounded."""
    numbers = torch.Generator().manual_seed(1)
    one, two = LoneTree(torch.tensor([3])), DraftTree(torch.tensor([3, 3]))
    for _ in range(4):
        nodes = two.frontier(3)
        children = answer(nodes[:1], numbers, "all")._replace(logprob=-torch.rand((1, nodes.shape[1], 3), generator=numbers))
        one.append(one.frontier(3), children)
        two.append(nodes, repeated(children))
    assert same(one.score, two.score) and same(one.newest()[1], two.newest()[1])


@pytest.mark.parametrize("spec", [spec for specs in SETTINGS.values() for spec in specs])
def test_policies_decide_alike_on_both(spec):
    """Every policy, alone and in the tree of a batch of one."""
    policy, language = make(spec), Language(5, steps=5)
    found = []
    for kind in (LoneTree, DraftTree):
        cycle = replace(cycle_at([0], [0]), cost=Priced())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("policies.drafting.new_tree", lambda root, needs, kind=kind: kind(root, needs))
            found.append(draft(policy, SyntheticDrafter(language, [language.truth(0, 3)]), cycle, fresh(policy, cycle)))
    lone, batch = found
    for name in ("token", "parent", "depth", "score"):
        assert torch.equal(getattr(lone.tree, name), getattr(batch.tree, name))
    assert torch.equal(lone.kept, batch.kept) and torch.equal(lone.widths, batch.widths)
