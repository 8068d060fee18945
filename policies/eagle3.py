"""EAGLE-2/3's dynamic tree: grow a beam by path probability, then keep the most probable nodes of all levels.

Li et al. 2024, "EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees"
(https://arxiv.org/abs/2406.16858), sections 4.1 and 4.2; same rules in EAGLE-3 (https://arxiv.org/abs/2503.01840).
"""

from __future__ import annotations

import torch
from torch import Tensor

from policies.contract import Cycle, Expansion, Policy, State, require
from policies.order import best
from policies.registry import policy
from policies.tree import DraftTree


@policy("eagle3", paper="https://arxiv.org/abs/2503.01840")
class Eagle3(Policy):
    """EAGLE-3's dynamic tree: expand the top-k nodes of each level, verify the best nodes overall.

    total_tokens counts the root (60 = root + 59 kept nodes); depth counts levels (the official code's depth=7 is 8
    here).
    """

    total_tokens: int = 60
    depth: int = 8
    top_k: int = 10

    levels, budget = "depth", "total_tokens"

    def __post_init__(self):
        require(self.total_tokens >= 1, self.name, f"total_tokens must be 1 or more, not {self.total_tokens}")
        require(self.depth >= 1, self.name, f"depth must be 1 or more, not {self.depth}")
        require(self.top_k >= 1, self.name, f"top_k must be 1 or more, not {self.top_k}")

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        if tree.levels == self.depth:
            return None
        return Expansion(tree.frontier(self.top_k), self.top_k)

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        return most_probable(tree, self.total_tokens - 1)


def most_probable(tree: DraftTree, count: int | Tensor) -> Tensor:
    """The ``count`` nodes (int, or int64 [B]) with the highest path probability, in total order: bool [B, N].

    Ancestor-closed: a child's score is at most its parent's, and a parent's index is lower.
    """
    kept = torch.zeros((tree.rows, tree.width), dtype=torch.bool, device=tree.device)
    if tree.width == 1:
        return kept
    largest = count if isinstance(count, int) else int(count.max())
    place = best(tree.score[:, 1:], largest) + 1  # behind the root, which is verified anyway; padding has no score
    if not isinstance(count, int):
        place = place.masked_fill(torch.arange(place.shape[1], device=place.device) >= count[:, None], 0)
    return kept.scatter(1, place, place > 0)
