"""AdaEDL: stop drafting where an entropy bound on the acceptance probability falls below a moving threshold.

Agrawal et al. 2024, "AdaEDL: Early Draft Stopping for Speculative Decoding of Large Language Models via an Entropy-based
Lower Bound on Token Acceptance Probability" (https://arxiv.org/abs/2410.18351): the bound is 1 - sqrt(gamma H) with
gamma = 0.2. The threshold follows the acceptance rate by the rule of Draft & Verify (Zhang et al. 2023,
https://arxiv.org/abs/2309.08168, section 3.3, constants of the released code): a moving average of the rate below its goal
raises the threshold a little, one above lowers it, unless the longest chain was drafted already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policies.contract import Cycle, Outcome, State, require
from policies.registry import policy
from policies.stopping import StoppingChain, proposed_by
from policies.tree import DraftTree


@policy("adaedl", paper="https://arxiv.org/abs/2410.18351")
class AdaEdl(StoppingChain):
    """A top-1 chain that ends with the first token for which 1 - sqrt(gamma * entropy) is below the threshold.

    ``start`` is the threshold of a fresh sequence, ``goal`` the acceptance rate it aims at; ``rate_memory`` and
    ``threshold_memory`` weigh the old value in each moving average, ``step`` is how far the threshold is pushed. With
    step 0 it stays. The starting value and the length limit are ours; gamma is the paper's, the others are those of
    Draft & Verify's code.
    """

    gamma: float = 0.2
    start: float = 0.6
    goal: float = 0.9
    rate_memory: float = 0.5
    threshold_memory: float = 0.9
    step: float = 0.01
    most: int = 20

    needs = frozenset({"entropy"})
    scope = "sequence"

    def __post_init__(self):
        for name in ("goal", "rate_memory", "threshold_memory"):
            value = getattr(self, name)
            require(0 <= value <= 1, self.name, f"{name} must lie between 0 and 1, not {value}")
        for name in ("gamma", "step"):
            require(getattr(self, name) >= 0, self.name, f"{name} must be 0 or more, not {getattr(self, name)}")
        require(self.most >= 1, self.name, f"most must be 1 or more, not {self.most}")

    def init(self, rows: int, key: Tensor) -> State:
        """threshold, rate: float64 [B]."""
        threshold = torch.full((rows,), self.start, dtype=torch.float64, device=key.device)
        return {"threshold": threshold, "rate": torch.zeros_like(threshold)}

    def goes_on(self, tree: DraftTree, last: Tensor, cycle: Cycle, state: State) -> Tensor:
        return 1 - (self.gamma * proposed_by(tree, last).double()).sqrt() >= state["threshold"]

    def observe(self, outcome: Outcome, cycle: Cycle, state: State) -> State:
        drafted = outcome.tree.size - 1
        rate = self.rate_memory * state["rate"]
        rate = rate + (1 - self.rate_memory) * (outcome.accepted.double() / drafted.clamp(min=1))
        push = torch.where(rate < self.goal, self.step, torch.where(drafted == self.most, 0.0, -self.step))
        kept = self.threshold_memory * state["threshold"]
        threshold = kept + (1 - self.threshold_memory) * (state["threshold"] + push)
        learns = cycle.active & (drafted > 0)
        return {
            "threshold": torch.where(learns, threshold, state["threshold"]),
            "rate": torch.where(learns, rate, state["rate"]),
        }
