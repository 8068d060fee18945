"""The drafting loop: the same code around a recorded drafter, a model, or a recorder."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from policies.children import Children, StoredChildren
from policies.contract import Cycle, Policy, State
from policies.order import NONE, order_key
from policies.tree import DraftTree


class Drafter(Protocol):
    """Proposes children. Two implementations: recorded (in sim) and model-backed (in live)."""

    def root(self, cycle: Cycle) -> Tensor:
        """Start a cycle at the rows' positions; the root tokens int64 [B]."""

    def expand(self, tree: DraftTree, nodes: Tensor, branching: int) -> Children | StoredChildren:
        """Run the draft on ``nodes`` int64 [B, W] (-1 = none), ``branching`` children each, most probable first."""


class Draft(NamedTuple):
    """A drafted tree and what to verify of it.

    tree    the whole draft tree
    kept    bool  [B, N]  nodes to verify, root included
    widths  int64 [B, L]  frontier width of each draft forward, the root's first; 0 where a row had stopped
    missing int64 [B]     expansions that the drafter could not answer
    """

    tree: DraftTree
    kept: Tensor
    widths: Tensor
    missing: Tensor


def draft(policy: Policy, drafter: Drafter, cycle: Cycle, state: State) -> Draft:
    """Draft one cycle: let the policy expand until no row wants more, then let it select what to verify."""
    tree = DraftTree(drafter.root(cycle), policy.needs)
    drafting, everyone = cycle.active, bool(cycle.active.all())
    reach = int(cycle.reach.min()) if tree.rows else 0
    widths: list[Tensor] = []
    missing = torch.zeros(tree.rows, dtype=torch.int64, device=tree.device)
    while (wish := policy.expand(tree, cycle, state)) is not None:
        nodes, branching = canonical(tree, wish.nodes, wish.branching)
        if isinstance(branching, Tensor) and branching.numel() == 1:
            branching = int(branching)
        if reach <= tree.levels or not everyone:  # else no node is too deep, as none is deeper than there are levels
            fits = tree.at("depth", nodes) < cycle.reach[:, None]
            nodes = nodes.masked_fill(~(fits & drafting[:, None]), NONE)
        if nodes.numel() and int(nodes.min()) >= 0:  # mostly: no place in any row is empty
            count = torch.full_like(tree.size, nodes.shape[1])
        else:
            count = (nodes >= 0).sum(1)
            drafting = count > 0
            everyone = bool(drafting.all())
            if not (everyone or bool(drafting.any())):
                break
        children = drafter.expand(tree, nodes, branching if isinstance(branching, int) else int(branching.max()))
        children = _only_asked(children, nodes, branching)
        tree.append(nodes, children)
        widths.append(count)
        if children.missing is not None:
            missing = missing + children.missing.sum(1)
    kept = policy.select(tree, cycle, state)
    if tree.ragged or not everyone:
        kept = kept & tree.exists & cycle.active[:, None]
    else:
        kept = kept.clone()  # it is the policy's own
    kept[:, 0] = True
    lengths = torch.stack(widths, dim=1) if widths else tree.size.new_zeros((tree.rows, 0))
    return Draft(tree, kept, lengths, missing)


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
    held = children.logprob.shape[2]
    if isinstance(branching, int) and branching == held:
        return children
    if isinstance(children, StoredChildren):
        children = children.read()
    if children.missing is not None:
        children = children._replace(missing=children.missing | ((nodes >= 0) & (branching > held)))
    if isinstance(branching, int):
        if held < branching:
            return children
        return children._replace(
            token=children.token[:, :, :branching],
            logprob=children.logprob[:, :, :branching],
            handle=children.handle[:, :, :branching],
        )
    fanout = min(int(branching.max()), held)
    unasked = torch.arange(fanout, device=branching.device) >= branching[:, :, None]
    return children._replace(
        token=children.token[:, :, :fanout].masked_fill(unasked, NONE),
        logprob=children.logprob[:, :, :fanout].masked_fill(unasked, -torch.inf),
        handle=children.handle[:, :, :fanout].masked_fill(unasked, NONE),
    )
