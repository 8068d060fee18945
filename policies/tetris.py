"""TETRIS: draft some more tokens than can be verified, and verify the likeliest of the whole batch.

Wu et al. 2025, "TETRIS: Optimal Draft Token Selection for Batch Speculative Decoding" (https://arxiv.org/abs/2502.15197),
section 3: the target has room for so many draft tokens per step; picking the largest products of draft probabilities, over
all requests, is optimal when those are the chances of acceptance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policies.contract import Cycle, Expansion, Policy, State, require
from policies.order import NONE
from policies.registry import policy
from policies.serving_batch import ServingBatches
from policies.tree import DraftTree


@policy("tetris", paper="https://arxiv.org/abs/2502.15197")
class Tetris(Policy):
    """Chains of ``k`` + ``extra`` tokens, of which the batch verifies the ``k`` * (its requests) likeliest.

    ``extra`` is one to three in the paper. Batches below ``turn_on`` requests verify chains of ``k`` (the authors'
    ``tetris_turn_on_batch_size``). The capacity grows with the requests that are left; ``k`` = 3 is our choice.
    """

    k: int = 3
    extra: int = 3
    turn_on: int = 2

    batch_wide = True

    def __post_init__(self):
        for name, least in {"k": 1, "extra": 0, "turn_on": 1}.items():
            value = getattr(self, name)
            require(value >= least, self.name, f"{name} must be {least} or more, not {value}")

    def begin(self, cycle: Cycle, state: State) -> State:
        """length: int64 [B], tokens to draft."""
        batches = ServingBatches(cycle)
        return {"length": batches.to_rows(torch.where(batches.size >= self.turn_on, self.k + self.extra, self.k))}

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        if tree.levels == self.k + self.extra:
            return None
        enough = state["length"] <= tree.levels
        return Expansion(tree.frontier(1).masked_fill(enough[:, None], NONE), 1)

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        batches = ServingBatches(cycle)
        entry, _ = batches.ranked(tree.score.masked_fill(~tree.drafted(), -torch.inf))
        return batches.first(entry, self.k * batches.size, tree.width)
