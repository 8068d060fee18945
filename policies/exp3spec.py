"""EXP3Spec of BanditSpec: play settings at random, the ones that lost little more often.

Hou et al. 2025, "BanditSpec: Adaptive Speculative Decoding via Bandit Algorithms" (https://arxiv.org/abs/2505.15141),
EXP3Spec: for rewards that need not come from a fixed distribution. Draws are counter-based (policies/philox.py), so that
replay and live decoding play the same arms.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from policies.arms import GAINS, Arms, emitted
from policies.contract import Cycle, Expansion, Outcome, Policy, State, require
from policies.philox import draw, uniform
from policies.registry import policy
from policies.tree import DraftTree

STREAM = 1
"""Keeps the arms' draws apart from those of the verification."""


@policy("exp3spec", paper="https://arxiv.org/abs/2505.15141")
class Exp3Spec(Policy):
    """A randomised bandit over chain lengths, or over EAGLE-3 settings (total_tokens, depth, top_k).

    In cycle t of a request, arm i is played with probability p_i in proportion to exp(-eta_t * its loss so far), with
    eta_t = sqrt(log K / (t K)); the arm played loses (L + 1 - gain) / (L p_i), L being the deepest arm's depth. ``gain`` as
    in ucbspec.
    """

    arms: tuple = (1, 2, 3, 4)
    gain: str = "tokens"
    seed: int = 0

    scope = "sequence"

    def __post_init__(self):
        Arms.check(self.arms, self.name)
        require(self.gain in GAINS, self.name, f"gain must be {' or '.join(GAINS)}, not '{self.gain}'")

    @cached_property
    def _arms(self) -> Arms:
        return Arms(self.arms)

    def init(self, rows: int, key: Tensor) -> State:
        """loss: float64 [B, K]; rounds: int64 [B], cycles so far."""
        loss = torch.zeros((rows, len(self.arms)), dtype=torch.float64, device=key.device)
        return {"loss": loss, "rounds": torch.zeros_like(key)}

    def begin(self, cycle: Cycle, state: State) -> State:
        """arm: int64 [B]; probability: float64 [B] with which it was drawn."""
        rate = (math.log(len(self.arms)) / ((state["rounds"] + 1).double() * len(self.arms))).sqrt()
        least = state["loss"].amin(1, keepdim=True)  # keeps the exponents small
        probability = normalised(torch.exp(-rate[:, None] * (state["loss"] - least)))
        arm = draw(probability, uniform(self.seed, cycle.sequence, cycle.number, STREAM))
        return state | {"arm": arm, "probability": probability.gather(1, arm[:, None])[:, 0]}

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        return self._arms.expand(tree, state["arm"])

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        return self._arms.select(tree, state["arm"])

    def observe(self, outcome: Outcome, cycle: Cycle, state: State) -> State:
        deepest = self._arms.deepest
        gain = emitted(outcome)[:, None] * self._arms.worth(self.gain, cycle, self.name)
        mine = torch.nn.functional.one_hot(state["arm"], len(self.arms)) * cycle.active[:, None]
        loss = state["loss"] + mine * ((deepest + 1 - gain) / (deepest * state["probability"][:, None]))
        return state | {"loss": loss, "rounds": state["rounds"] + cycle.active}


def normalised(weight: Tensor) -> Tensor:
    """Rows of ``weight`` float64 [B, K] divided by their sums, which are taken in index order: the same bits everywhere."""
    total = torch.zeros_like(weight[:, 0])
    for index in range(weight.shape[1]):
        total = total + weight[:, index]
    return weight / total[:, None]
