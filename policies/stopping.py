"""Chains that a rule ends: draft the most probable next token again and again until the last one says stop.

A rule looks at the token that was drafted last and decides about the next one; the last token stays. So a rule never drops
a token for that token's own probability, and the text stays exact when drafts are sampled, too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policies.contract import Cycle, Expansion, Policy, State
from policies.order import NONE
from policies.tree import DraftTree


class StoppingChain(Policy):
    """Base of chains with a stopping rule: a subclass says in :meth:`goes_on` whether to draft one more token.

    The first token is always drafted. ``most`` is the longest chain. A recording holds the draft's own chain to depth 24
    (traces/cover.py); where a longer one leaves the true path, what it lacks counts as missing.
    """

    most: int

    def goes_on(self, tree: DraftTree, last: Tensor, cycle: Cycle, state: State) -> Tensor:
        """Whether to draft behind the nodes ``last`` int64 [B, 1] (0 in rows that have stopped): bool [B]."""
        raise NotImplementedError

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        if tree.levels == self.most:
            return None
        last = last_token(tree)
        if tree.levels > 0:
            on = self.goes_on(tree, last.clamp(min=0), cycle, state)
            last = last.masked_fill(~on[:, None], NONE)
        return Expansion(last, 1)

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        return tree.exists


def last_token(tree: DraftTree) -> Tensor:
    """The node that was drafted last, int64 [B, 1]: the root at first, -1 in rows whose chain has ended."""
    last = tree.frontier(1)
    return last if last.shape[1] else torch.full_like(tree.root_nodes(), NONE)  # every row has ended


def proposed_by(tree: DraftTree, last: Tensor) -> Tensor:
    """Entropy float32 [B] (nats) of the distributions that the nodes ``last`` int64 [B, 1] were taken from."""
    parent = tree.parent.gather(1, last).clamp(min=0)
    return tree.entropy.gather(1, parent)[:, 0]
