"""A chain that was looked up whole is followed at once; a policy decides on it as when the drafter is asked level by level."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from policies.contract import Expansion, Policy
from policies.drafting import draft
from policies.lone_tree import LoneTree
from policies.lookup.drafter import LookupDrafter
from policies.lookup.first import LookupFirst
from policies.lookup.rule import load_rule
from policies.loop import run_cycle
from policies.registry import load_policy
from tests.policies.cases import SETTINGS, make
from tests.policies.lookups import past_of, texts
from tests.policies.synthetic import Language, Priced, SyntheticDrafter, SyntheticVerifier, cycle_at, fresh

ROWS, ROOTS = texts(7, rows=8, vocabulary=5), [59, 50, 41, 33, 30, 12, 2, 0]
REACH = [3, 10**6, 1, 10**6, 2, 10**6, 0, 10**6]
LONG = 1
"""The row in which most is found."""
PAST = past_of(ROWS, ROOTS, 1)
RULES = ("prompt_lookup(ngram=4, tokens=6)", "suffix(depth=9, least=0.0)", "suffix(depth=7, tree=true, offset=3)")
COLUMNS = ("token", "parent", "depth", "rank", "handle", "logprob", "score", "expanded")


class LevelByLevel:
    """A drafter that is asked at every level."""

    def __init__(self, drafter):
        self.drafter, self.deepest = drafter, drafter.deepest

    def root(self, cycle):
        return self.drafter.root(cycle)

    def expand(self, tree, nodes, branching):
        return self.drafter.expand(tree, nodes, branching)


def past_of_row(row: int):
    return PAST._replace(**{name: getattr(PAST, name)[[row]] for name in ("first", "root", "shift", "told")})


def drafter_of(rule: str, row: int, first: bool):
    lookup = LookupDrafter(load_rule(rule), lambda _: past_of_row(row))
    return LookupFirst(lookup, SyntheticDrafter(Language(3), ROWS)) if first else lookup


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("spec", [spec for specs in SETTINGS.values() for spec in specs])
def test_every_policy_decides_alike(spec, rule):
    policy, verifier = make(spec), SyntheticVerifier(ROWS)
    for row, (root, reach) in enumerate(zip(ROOTS, REACH, strict=True)):
        cycle = replace(cycle_at([row], [root], reach), cost=Priced())
        for first in (False, True) if row < 3 else (row % 2 == 0,):
            drafters = drafter_of(rule, row, first), LevelByLevel(drafter_of(rule, row, first))
            at_once, asked = (run_cycle(policy, drafter, verifier, cycle, fresh(policy, cycle)) for drafter in drafters)
            for name in ("kept", "widths", "looked_up", "missing"):
                assert torch.equal(getattr(at_once.draft, name), getattr(asked.draft, name))
            assert at_once.draft.tree.levels == asked.draft.tree.levels
            for name in COLUMNS:
                assert torch.equal(getattr(at_once.draft.tree, name), getattr(asked.draft.tree, name))
            if "entropy" in policy.needs:
                assert torch.equal(at_once.draft.tree.entropy, asked.draft.tree.entropy)
            assert at_once.state.keys() == asked.state.keys()
            assert all(same(at_once.state[name], asked.state[name]) for name in asked.state)


def same(one, other) -> bool:
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else type(one) is type(other)


def levels_asked(policy, rule: str, row: int) -> tuple[int, int]:
    """How often the drafter was asked, and how many levels there were."""
    drafter, asked = drafter_of(rule, row, False), []
    answer = drafter.expand
    drafter.expand = lambda tree, nodes, branching: asked.append(tree.levels) or answer(tree, nodes, branching)
    cycle = cycle_at([row], [ROOTS[row]])
    found = draft(policy, drafter, cycle, fresh(policy, cycle))
    return len(asked), found.tree.levels


@pytest.mark.parametrize("rule", RULES[:2])
def test_the_drafter_is_asked_once(rule):
    counts = [levels_asked(load_policy("chain(k=4)"), rule, row) for row in range(len(ROWS))]
    assert {asked for asked, _ in counts} == {1} and max(levels for _, levels in counts) == 4
    beyond = [levels_asked(load_policy("chain(k=20)"), rule, row) for row in range(len(ROWS))]
    assert {asked for asked, _ in beyond} == {1}, "not even for what stands behind the last node"


def test_a_tree_is_asked_for_level_by_level():
    """What was looked up branches: its other children are of no chain."""
    counts = [levels_asked(load_policy("eagle3(total_tokens=20, depth=4, top_k=4)"), RULES[2], row) for row in range(len(ROWS))]
    assert any(asked == levels > 1 for asked, levels in counts)


class Elsewhere:
    """A chain of three that then goes back to the first node, or asks for no children, or in a tensor of its own."""

    name, needs, scope = "elsewhere", frozenset(), "cycle"

    def __init__(self, wish):
        self.wish = wish

    def expand(self, tree, cycle, state):
        return Expansion(tree.frontier(1), 1) if tree.levels < 3 else self.wish(tree) if tree.levels == 3 else None

    def select(self, tree, cycle, state):
        return tree.exists


@pytest.mark.parametrize(
    "wish",
    [
        lambda tree: Expansion(torch.tensor([[1]]), 1),
        lambda tree: Expansion(tree.frontier(1), 0),
        lambda tree: Expansion(tree.frontier(1), torch.tensor([[1]])),
        lambda tree: Expansion(torch.tensor([[tree.width - 1]]), 2),
        lambda tree: Expansion(torch.tensor([[-1]]), 2),
    ],
    ids=["an earlier node", "no children", "a tensor", "its own list", "none"],
)
def test_whoever_leaves_the_chain_is_asked_for(wish):
    cycle, found = cycle_at([LONG], [ROOTS[LONG]]), []
    for drafter in (drafter_of(RULES[0], LONG, False), LevelByLevel(drafter_of(RULES[0], LONG, False))):
        found.append(draft(Elsewhere(wish), drafter, cycle, {}))
    for name in COLUMNS:
        assert torch.equal(getattr(found[0].tree, name), getattr(found[1].tree, name))
    assert torch.equal(found[0].widths, found[1].widths) and found[0].tree.width > 3


class Listening(Policy):
    """Drafts a chain and notes what it hears of each level."""

    name, needs = "listening", frozenset({"entropy"})

    def __init__(self):
        self.heard = []

    def expand(self, tree, cycle, state):
        if tree.levels:
            self.heard.append(tree.newest_listed())
        return Expansion(tree.frontier(1), 4) if tree.levels < 9 else None

    def select(self, tree, cycle, state):
        return tree.exists


@pytest.mark.parametrize("rule", RULES[:2])
def test_what_a_policy_hears_of_a_level(rule):
    for row, root in enumerate(ROOTS):
        policies = Listening(), Listening()
        for policy, drafter in zip(policies, (drafter_of(rule, row, True), LevelByLevel(drafter_of(rule, row, True))), strict=True):
            draft(policy, drafter, cycle_at([row], [root]), {})
        at_once, asked = ([(list(level.node), *level[1:]) for level in policy.heard] for policy in policies)
        assert at_once == asked and len(asked) > 1


def test_a_chain_is_written_down_as_it_would_be_heard():
    """The tree that followed a chain turns into the tree of a batch as any other does."""
    cycle = cycle_at([LONG], [ROOTS[LONG]])
    found = draft(load_policy("chain(k=5)"), drafter_of(RULES[0], LONG, False), cycle, {})
    assert type(found.tree) is LoneTree
    columns = {name: getattr(found.tree, name).clone() for name in ("token", "parent", "depth", "handle", "logprob", "score")}
    assert found.tree.size.tolist() == [found.tree.width], "asked for what only the tree of a batch knows"
    assert type(found.tree) is not LoneTree
    assert all(torch.equal(getattr(found.tree, name), value) for name, value in columns.items())
