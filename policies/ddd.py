"""Dynamic Depth Decoding: EAGLE-2's tree, drafted on only while its beam still holds enough probability.

Brown et al. 2024, "Dynamic Depth Decoding: Faster Speculative Decoding for LLMs" (https://arxiv.org/abs/2409.00142),
section 2 (eq. 1, algorithm 1) and section 3.2. The test breaks the lazy evaluation of the draft, so it is made after
few chosen steps only.
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


@policy("ddd", paper="https://arxiv.org/abs/2409.00142")
class DynamicDepth(Policy):
    """EAGLE-2's tree, whose drafting stops after a chosen level where the beam's log-probability is low.

    ``depth`` is n, the most draft forwards; after the levels in ``checks`` (S) drafting goes on only where
    H = log sum exp(score) over the ``top_k`` (w) nodes of the beam, in nats, is at least ``threshold`` (x).
    ``total_tokens`` counts the root and is EAGLE-2's, as the paper takes EAGLE-2's optimal values. All defaults are
    published.
    """

    total_tokens: int = 60
    depth: int = 11
    top_k: int = 10
    checks: tuple[int, ...] = (5, 7, 9)
    threshold: float = -0.3

    def __post_init__(self):
        for name in ("total_tokens", "depth", "top_k"):
            require(getattr(self, name) >= 1, self.name, f"{name} must be 1 or more, not {getattr(self, name)}")
        require(all(level >= 1 for level in self.checks), self.name, f"checks must be levels from 1, not {self.checks}")

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        if tree.levels == self.depth:
            return None
        nodes = tree.frontier(self.top_k)
        if tree.levels in self.checks:
            _, score = tree.newest()
            heuristic = torch.log(probability_mass(score, self.top_k).to(torch.float64)).to(torch.float32)
            nodes = nodes.masked_fill((heuristic < self.threshold)[:, None], NONE)
        return Expansion(nodes, self.top_k)

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        return most_probable(tree, self.total_tokens - 1)
