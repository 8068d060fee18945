"""Chains whose length is set before the cycle, row by row, from what earlier cycles taught."""

from __future__ import annotations

from torch import Tensor

from policies.contract import Cycle, Expansion, Outcome, Policy, State
from policies.order import NONE
from policies.tree import DraftTree


class SizedChain(Policy):
    """Base of chains of ``state["length"]`` tokens, int64 [B] or [1]; never more than ``most``."""

    most: int

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        if tree.levels == self.most:
            return None
        enough = state["length"] <= tree.levels
        return Expansion(tree.frontier(1).masked_fill(enough[:, None], NONE), 1)

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        return tree.exists


def nothing_rejected(outcome: Outcome) -> Tensor:
    """bool [B]: the target took every token of the chain, up to an end of sequence if there was one in it."""
    return ~(outcome.status == 0).any(1)
