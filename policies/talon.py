"""TALON: spend a budget of nodes layer by layer on what is nearly as probable as the layer's best node.

Liu et al. 2026, "Talon: Confidence-Aware Speculative Decoding with Adaptive Token Trees"
(https://arxiv.org/abs/2601.07353), section 5.2 and algorithm 2. Sure contexts give deep and narrow trees, unsure ones
shallow and wide trees. The first layer is the plain top K, as a draft that is sure and wrong there loses everything.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from policies.contract import Cycle, Expansion, Policy, State, require
from policies.marks import with_marks
from policies.order import NONE, best
from policies.registry import policy
from policies.tree import DraftTree


@policy("talon", paper="https://arxiv.org/abs/2601.07353")
class Talon(Policy):
    """Grow layers of nodes within a factor of the layer's best path probability, until a node budget is spent.

    ``total_tokens`` is N, the root counted; the first layer is the ``top_k`` (K) most probable tokens; of each later
    one the nodes with path probability at least ``mu`` times the layer's highest are taken, and the most probable of
    them where the budget does not reach for all. Published: 60, 10 and 0.03.

    The rest is a capped form that lies nearly inside the default recording: of a layer's nodes the ``width`` most
    probable are expanded, into ``branching`` children each, over at most ``depth`` layers. The paper has no such
    limits; ``talon(width=60, branching=60, depth=60)`` is its tree, as N nodes cannot hold more.
    """

    total_tokens: int = 60
    top_k: int = 10
    mu: float = 0.03
    width: int = 10
    branching: int = 10
    depth: int = 14

    published = "talon(width=60, branching=60, depth=60)"

    def __post_init__(self):
        for name in ("total_tokens", "top_k", "width", "branching", "depth"):
            require(getattr(self, name) >= 1, self.name, f"{name} must be 1 or more, not {getattr(self, name)}")
        require(0 < self.mu <= 1, self.name, f"mu must lie above 0 and be at most 1, not {self.mu}")

    def begin(self, cycle: Cycle, state: State) -> State:
        """Nodes left to spend int64 [B], and which nodes were taken: int64 [B, N], 1 taken, -1 not."""
        rows, device = cycle.active.shape[0], cycle.active.device
        return state | {
            "left": torch.full((rows,), self.total_tokens - 1, device=device),
            "taken": torch.ones((rows, 1), dtype=torch.int64, device=device),
        }

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        if tree.levels == 0:
            return Expansion(tree.root_nodes(), self.top_k) if self.total_tokens > 1 else None
        nodes = self.layer(tree, state["left"])
        state["taken"] = with_marks(tree, state["taken"], nodes, torch.ones_like(nodes))
        state["left"] = state["left"] - (nodes >= 0).sum(1)
        if tree.levels == self.depth:
            return None
        unspent = (state["left"] > 0)[:, None]
        return Expansion(nodes[:, : self.width].masked_fill(~unspent, NONE), self.branching)

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        return state["taken"] > 0

    def layer(self, tree: DraftTree, left: Tensor) -> Tensor:
        """The nodes to take of the newest layer, most probable first: int64 [B, L], -1 where a row takes fewer."""
        index, score = tree.newest()
        place = best(score, self.total_tokens - 1)
        taken = (place >= 0) & (torch.arange(place.shape[1], device=tree.device) < left[:, None])
        if tree.levels > 1:
            score = score.gather(1, place.clamp(min=0))
            taken = taken & (score >= score[:, :1] + math.log(self.mu))  # p >= mu * p of the best, in logs
        return index.gather(1, place.clamp(min=0)).masked_fill(~taken, NONE)
