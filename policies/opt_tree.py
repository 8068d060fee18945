"""OPT-Tree: grow a layer only while it adds enough to the expected acceptance length, and verify the best nodes.

Wang et al. 2025, "OPT-Tree: Speculative Decoding with Adaptive Draft Tree Structure" (TACL 13,
https://arxiv.org/abs/2406.17276), section 3 and algorithm 1. The expected acceptance length of a tree is the sum of its
nodes' path probabilities (eq. 3), so the best tree of n nodes is the n most probable nodes of all layers.

The official code (github.com/Jikai0Wang/OPT-Tree) compares the sums one layer late and drops the layer it drafted last;
this file follows the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policies.contract import Cycle, Expansion, Policy, State, require
from policies.eagle3 import most_probable
from policies.order import NONE
from policies.registry import policy
from policies.sums import probability_mass
from policies.tree import DraftTree


@policy("opt_tree", paper="https://arxiv.org/abs/2406.17276")
class OptTree(Policy):
    """Draft layers while the n best nodes gain more than a threshold of expected tokens; verify those n.

    ``nodes`` is n, the root not counted; ``threshold`` is delta (expected tokens; the paper bounds it below by a draft
    step's time over a decoding step's); ``depth`` the most layers. Published: 60, 0.5 and 10.

    ``width`` is how many nodes of a layer are expanded, and into how many children each. The paper's is n: 60, which
    ``opt_tree(width=60)`` gives. The default of 10 is a capped form that lies inside the default recording.
    """

    nodes: int = 60
    threshold: float = 0.5
    depth: int = 10
    width: int = 10

    published = "opt_tree(width=60)"

    def __post_init__(self):
        for name in ("nodes", "depth", "width"):
            require(getattr(self, name) >= 1, self.name, f"{name} must be 1 or more, not {getattr(self, name)}")
        require(self.threshold >= 0, self.name, f"threshold must be 0 or more, not {self.threshold}")

    def begin(self, cycle: Cycle, state: State) -> State:
        """The expected acceptance length float32 [B] at the last look; 0 before the first layer."""
        return state | {"expected": torch.zeros(cycle.active.shape, device=cycle.active.device)}

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        if tree.levels == 0:
            return Expansion(tree.root_nodes(), self.width)
        if tree.levels == self.depth:
            return None
        expected = probability_mass(tree.score.masked_fill(~tree.drafted(), -torch.inf), self.nodes)
        worth_it = expected - state["expected"] > self.threshold
        state["expected"] = expected
        return Expansion(tree.frontier(self.width).masked_fill(~worth_it[:, None], NONE), self.width)

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        return most_probable(tree, self.nodes)
