"""Two drafters as one: a training-free rule where it finds something, a draft network elsewhere.

As engines do that have both: SAM-Decoding (https://arxiv.org/abs/2411.10666) drafts with EAGLE-2 where its suffix automaton
has no long match; ArcticInference puts SuffixDecoding (https://arxiv.org/abs/2411.04975) before a trained speculator.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from policies.children import Children, Only, StoredChildren
from policies.contract import Cycle
from policies.drafting import Drafter
from policies.lookup.drafter import LookupDrafter
from policies.one_row import alone, flag
from policies.order import NONE
from policies.tree import DraftTree


class LookupFirst:
    """Asks the rule about every root; whoever answers there drafts the whole cycle of that row.

    A row in which the rule proposes a token or more is the rule's. The network is asked for the others only, and not at all
    where none is left, so that it pays no draft forward, nor a catch-up before it next drafts. A child's handle is that of whoever
    proposed it.
    """

    def __init__(self, lookup: LookupDrafter, network: Drafter):
        self.lookup, self.network = lookup, network
        self.deepest = network.deepest  # whoever answers: the cycle is one before it is known who does

    def __copy__(self) -> LookupFirst:
        """A drafter remembers its cycle: a copy has two of its own."""
        return LookupFirst(copy.copy(self.lookup), copy.copy(self.network))

    def root(self, cycle: Cycle) -> Tensor:
        self.lookup.begin(cycle)
        return self.network.root(cycle)

    def expand(self, tree: DraftTree, nodes: Tensor, branching: int) -> Children | StoredChildren:
        found: Children | None = None
        if tree.levels == 0:
            found = self.lookup.expand(tree, nodes, branching)
            self._known = answering(found.token)
            known = self._known.tolist()
            self._some, self._all = any(known), all(known)
        if not self._some:
            return self.network.expand(tree, nodes, branching)
        ours, theirs = (nodes, None) if self._all else self._shared_out(nodes)
        if ours is None:
            return self.network.expand(tree, theirs, branching)
        found = self.lookup.expand(tree, ours, branching) if found is None else found
        if theirs is not None:
            found = by_row(self._known, found, self.network.expand(tree, theirs, branching), branching)
        return found._replace(free=self._known)

    def chain_found(self) -> Iterator[Only] | None:
        """As :meth:`LookupDrafter.chain_found`."""
        return self.lookup.chain_found() if self._all else None

    def _shared_out(self, nodes: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The nodes int64 [B, W] of the rule's rows, and those of the network's: -1 elsewhere, None where there are none."""
        ours = nodes.masked_fill(~self._known[:, None], NONE)
        theirs = nodes.masked_fill(self._known[:, None], NONE)
        return tuple(part if int(part.max()) >= 0 else None for part in (ours, theirs))


def answering(token: Tensor) -> Tensor:
    """Which rows hold a token in int64 [B, W, K]: bool [B]."""
    if alone(token):
        return flag(max(token.flatten().tolist(), default=NONE) >= 0)
    return (token >= 0).flatten(1).any(1)


def by_row(known: Tensor, found: Children, drafted: Children | StoredChildren, branching: int) -> Children:
    """The children ``found`` in the rows ``known`` bool [B], those that were ``drafted`` in the others; the narrower are padded.

    :param branching: the most children that were asked for. A rule never lacks any; a recording may hold fewer.
    """
    drafted = drafted.read() if isinstance(drafted, StoredChildren) else drafted
    held = None if drafted.missing is None else torch.where(known, branching, drafted.token.shape[2])
    width = max(branching, found.token.shape[2], drafted.token.shape[2])

    def chosen(ours: Tensor, theirs: Tensor, fill: float) -> Tensor:
        pair = (torch.nn.functional.pad(part, (0, width - part.shape[2]), value=fill) for part in (ours, theirs))
        return torch.where(known[:, None, None], *pair)

    return Children(
        token=chosen(found.token, drafted.token, NONE),
        logprob=chosen(found.logprob, drafted.logprob, -torch.inf),
        entropy=torch.where(known[:, None], found.entropy, drafted.entropy),
        handle=chosen(found.handle, drafted.handle, NONE),
        missing=drafted.missing,
        held=held,
    )
