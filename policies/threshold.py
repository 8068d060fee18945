"""The two-parameter rule: draft on while the frontier is likely enough, verify the nodes that are likely enough.

A yardstick of our own for adaptive policies, in the spirit of the confidence thresholds of chains (Hugging Face's assisted
generation; Kangaroo, https://arxiv.org/abs/2404.18911) on EAGLE-2's beam (https://arxiv.org/abs/2406.16858): the draft's
path probabilities are taken at their word, and time is not looked at.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from policies.contract import Cycle, Expansion, Policy, State, require
from policies.eagle3 import most_probable
from policies.order import NONE
from policies.registry import policy
from policies.tree import DraftTree


@policy("threshold", paper="https://arxiv.org/abs/2406.16858")
class Threshold(Policy):
    """Draft another level while the frontier's probability mass is at least ``mass``; verify nodes of ``probability``.

    The frontier is EAGLE-3's: the ``top_k`` most probable nodes of the newest level. Its mass is the sum of their path
    probabilities. Of the nodes whose path probability is at least ``probability``, the best ``total_tokens`` - 1 are
    verified. ``depth`` is the most levels.
    """

    mass: float = 0.5
    probability: float = 0.05
    depth: int = 12
    top_k: int = 10
    total_tokens: int = 80

    fits_on_cost = True

    def __post_init__(self):
        for name in ("mass", "probability"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, self.name, f"{name} must be a number from 0 up, not {value}")
        for name in ("depth", "top_k", "total_tokens"):
            value = getattr(self, name)
            require(value >= 1, self.name, f"{name} must be 1 or more, not {value}")

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        if tree.levels == self.depth:
            return None
        frontier = tree.frontier(self.top_k)
        likely = frontier_mass(tree, frontier) >= self.mass
        return Expansion(frontier.masked_fill(~likely[:, None], NONE), self.top_k)

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        least = math.log(self.probability) if self.probability else -math.inf
        return most_probable(tree, self.total_tokens - 1) & (tree.score >= least)

    def fit(self, samples: Any) -> Threshold:
        """Nothing to learn from samples; :meth:`variants` are tried by predicted time."""
        return self

    def variants(self, ms_per_token: float) -> list[Threshold]:
        """One parameter larger or smaller by half."""
        steps = [(1.0, 1.5), (1.0, 1 / 1.5), (1.5, 1.0), (1 / 1.5, 1.0)]
        return [replace(self, mass=self.mass * a, probability=self.probability * b) for a, b in steps]


def frontier_mass(tree: DraftTree, frontier: Tensor) -> Tensor:
    """Sum float64 [B] of the path probabilities of the ``frontier`` nodes int64 [B, W], best first, one by one."""
    score = tree.score.gather(1, frontier.clamp(min=0)).masked_fill(frontier < 0, -torch.inf)
    probability = torch.exp(score.to(torch.float64))
    mass = probability.new_zeros(tree.rows)  # the frontier may be empty
    for one in probability.unbind(1):  # a sum of fixed order: the same bits at every batch shape
        mass = mass + one
    return mass
