"""The drafting loop: the same code around a recorded drafter, a model, or a recorder."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from policies.children import Children, Only, StoredChildren, lacking
from policies.contract import Cycle, Expansion, Policy, State
from policies.lone_tree import LoneTree, new_tree
from policies.one_row import every, integers, least
from policies.order import NONE, order_key
from policies.tree import DraftTree


class Drafter(Protocol):
    """Proposes children. Two implementations: recorded (in sim) and model-backed (in live).

    One that looks up whole chains may have a method ``chain_found`` as well (`policies.lookup.drafter`).
    """

    deepest: int | None
    """Depth of the deepest nodes that it drafts; None: as deep as asked."""

    def root(self, cycle: Cycle) -> Tensor:
        """Start a cycle at the rows' positions; the root tokens int64 [B]."""

    def expand(self, tree: DraftTree, nodes: Tensor, branching: int) -> Children | StoredChildren:
        """Run the draft on ``nodes`` int64 [B, W] (-1 = none), ``branching`` children each, most probable first."""


class Draft(NamedTuple):
    """A drafted tree and what to verify of it.

    tree       the whole draft tree
    kept       bool  [B, N]  nodes to verify, root included
    widths     int64 [B, L]  frontier width of each draft forward, the root's first; 0 where a row had stopped, or was looked up
    looked_up  int64 [B]     levels that were answered without a draft forward
    missing    int64 [B]     expansions that the drafter could not answer
    """

    tree: DraftTree
    kept: Tensor
    widths: Tensor
    looked_up: Tensor
    missing: Tensor


class Growth:
    """A draft tree that grows under a policy, level by level: ask for :meth:`wish`, run the draft, :meth:`take` its answer.

    tree       the draft tree so far
    widths     per level, the nodes that the draft was run on in each row: int64 [B], or one number for all
    looked_up  int64 [B]: levels that were answered without a draft forward
    missing    int64 [B]: expansions that the drafter could not answer
    everyone   whether all rows drafted at the last level
    """

    def __init__(self, policy: Policy, root: Tensor, cycle: Cycle, state: State):
        """:param root: the root tokens int64 [B]."""
        self.policy, self.cycle, self.state = policy, cycle, state
        self.tree = new_tree(root, policy.needs)
        self.widths: list[Tensor | int] = []
        self.looked_up = self.missing = _nothing(self.tree.rows, self.tree.device)
        self._drafting, self.everyone = cycle.active, every(cycle.active)
        self._reach = least(cycle.reach) if self.tree.rows else 0
        self._heard: list[Expansion | None] = []  # the wish that the policy has uttered already, if it has

    def wish(self) -> Expansion | None:
        """The nodes int64 [B, W] to run the draft on next, in canonical order, and how many children each; None at the end."""
        tree = self.tree
        wish = self._heard.pop() if self._heard else self.policy.expand(tree, self.cycle, self.state)
        if wish is None:
            return None
        nodes, branching = canonical(tree, wish.nodes, wish.branching)
        if isinstance(branching, Tensor) and branching.numel() == 1:
            branching = int(branching)
        if self._reach <= tree.levels or not self.everyone:  # else no node is too deep: none is deeper than there are levels
            fits = tree.at("depth", nodes) < self.cycle.reach[:, None]
            nodes = nodes.masked_fill(~(fits & self._drafting[:, None]), NONE)
        if nodes.numel() and least(nodes) >= 0:  # mostly: no place in any row is empty
            self.widths.append(nodes.shape[1])
        else:
            count = (nodes >= 0).sum(1)
            self._drafting = count > 0
            self.everyone = bool(self._drafting.all())
            if not (self.everyone or bool(self._drafting.any())):
                return None
            self.widths.append(count)
        return Expansion(nodes, branching)

    def all_widths(self) -> Tensor:
        """The widths of all levels, int64 [B, L]."""
        rows, device = self.tree.rows, self.tree.device
        if all(isinstance(width, int) for width in self.widths):
            return integers([self.widths], self.missing).expand(rows, -1)
        whole = (torch.full((rows,), width, device=device) if isinstance(width, int) else width for width in self.widths)
        return torch.stack(list(whole), dim=1)

    def take(self, wish: Expansion, children: Children | StoredChildren) -> None:
        """Append the children of the nodes that were wished for."""
        children = _only_asked(children, *wish)
        self.tree.append(wish.nodes, children)
        if children.missing is not None:
            self.missing = self.missing + children.missing.sum(1)
        if children.free is not None:
            self._refund(children.free)

    def follow(self, chain: Iterator[Only]) -> None:
        """Go down a chain that a drafter has looked up below the newest node, the first level's only one: the policy is asked level
        by level as ever, and nobody else."""
        tree, first = self.tree, self.widths[-1]
        while tree.levels < self._reach:
            wish = self.policy.expand(tree, self.cycle, self.state)
            if wish is None or not self._goes_down(wish):
                self._heard.append(wish)
                break
            tree.append_only(next(chain))
            self.widths.append(first)
        if first == 0 and tree.levels > 1:  # no forward stands for the first level, nor for the others
            self.looked_up = self.looked_up + (tree.levels - 1)

    def _goes_down(self, wish: Expansion) -> bool:
        """Whether this asks for children of the newest node and nothing else, in a tree of plain numbers."""
        plain = isinstance(self.tree, LoneTree) and isinstance(wish.branching, int)
        return plain and wish.branching > 0 and self.tree.is_newest(wish.nodes)

    def _refund(self, free: Tensor) -> None:
        """No draft forward was run for the rows ``free`` bool [B] at the newest level."""
        width = self.widths[-1]
        if isinstance(width, int) and every(free):
            self.widths[-1], self.looked_up = 0, self.looked_up + 1
        else:
            width = torch.as_tensor(width, device=free.device).expand(len(free))
            self.widths[-1], self.looked_up = width.masked_fill(free, 0), self.looked_up + (free & (width > 0))


def draft(policy: Policy, drafter: Drafter, cycle: Cycle, state: State) -> Draft:
    """Draft one cycle: let the policy expand until no row wants more, then let it select what to verify."""
    cycle = cycle.up_to(drafter.deepest)
    growth = Growth(policy, drafter.root(cycle), cycle, state)
    tree = growth.tree
    while (wish := growth.wish()) is not None:
        growth.take(wish, drafter.expand(tree, wish.nodes, most_children(wish)))
        if tree.levels == 1 and tree.width == 2 and (chain := chain_found(drafter)) is not None:
            growth.follow(chain)
    kept = policy.select(tree, cycle, state)
    if tree.ragged or not growth.everyone:
        kept = kept & tree.exists & cycle.active[:, None]
    kept = kept | _only_root(tree.width, tree.device)
    return Draft(tree, kept, growth.all_widths(), growth.looked_up, growth.missing)


def chain_found(drafter: Drafter) -> Iterator[Only] | None:
    """Behind the first level: what a drafter that looks up has found below the only node of it, if it has, and that is a chain."""
    ask = getattr(drafter, "chain_found", None)
    return None if ask is None else ask()


@lru_cache(maxsize=64)
def _nothing(rows: int, device: torch.device) -> Tensor:
    """0 int64 [B]; nobody writes into it."""
    return torch.zeros(rows, dtype=torch.int64, device=device)


@lru_cache(maxsize=256)
def _only_root(width: int, device: torch.device) -> Tensor:
    """bool [1, N], the root alone; nobody writes into it."""
    return torch.arange(width, device=device)[None] == 0


def most_children(wish: Expansion) -> int:
    """The most children that any node of a wish is to have."""
    return wish.branching if isinstance(wish.branching, int) else int(wish.branching.max())


def canonical(tree: DraftTree, nodes: Tensor, branching: int | Tensor) -> tuple[Tensor, int | Tensor]:
    """The frontier in canonical order (score descending, index ascending), whatever order the policy named it in."""
    if tree.is_frontier(nodes) or nodes.shape[1] == 1:
        return nodes, branching
    score = tree.at("score", nodes).masked_fill(nodes < 0, -torch.inf)
    tie = (score[:, 1:] == score[:, :-1]) & (nodes[:, 1:] > nodes[:, :-1])
    if bool(((score[:, 1:] < score[:, :-1]) | tie).all()):
        return nodes, branching
    by_index = nodes.masked_fill(nodes < 0, torch.iinfo(torch.int64).max).argsort(dim=1)
    place = by_index.gather(1, order_key(score.gather(1, by_index)).argsort(dim=1, descending=True))
    ordered = nodes.gather(1, place)
    return ordered, branching if isinstance(branching, int) else branching.gather(1, place)


def _only_asked(
    children: Children | StoredChildren, nodes: Tensor, branching: int | Tensor
) -> Children | StoredChildren:
    """A policy sees only what it asked for, never the rest of a wide recording; a too narrow one counts as missing."""
    width = children.logprob.shape[2]
    if isinstance(branching, int) and branching == width and children.held is None:
        return children
    if isinstance(children, StoredChildren):
        children = children.read()
    children = children._replace(missing=lacking(children, nodes, branching))
    if isinstance(branching, int):
        if width <= branching:
            return children
        return children._replace(
            token=children.token[:, :, :branching],
            logprob=children.logprob[:, :, :branching],
            handle=children.handle[:, :, :branching],
        )
    fanout = min(int(branching.max()), width)
    unasked = torch.arange(fanout, device=branching.device) >= branching[:, :, None]
    return children._replace(
        token=children.token[:, :, :fanout].masked_fill(unasked, NONE),
        logprob=children.logprob[:, :, :fanout].masked_fill(unasked, -torch.inf),
        handle=children.handle[:, :, :fanout].masked_fill(unasked, NONE),
    )
