"""TapOut: a bandit that chooses which stopping rule ends the next chain.

Sridhar et al. 2025, "TapOut: A Bandit-Based Approach to Dynamic Speculative Decoding" (https://arxiv.org/abs/2511.02017):
instead of tuning a rule's threshold, let UCB1 (Auer et al. 2002, https://doi.org/10.1023/A:1013689704352) play several
untuned rules, one per cycle, and keep what it learns across requests.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from policies.contract import Cycle, Outcome, State, require
from policies.order import best
from policies.registry import load_policy, policy
from policies.stopping import StoppingChain
from policies.tree import DraftTree


@policy("tapout", paper="https://arxiv.org/abs/2511.02017")
class TapOut(StoppingChain):
    """A top-1 chain ended by one of several stopping rules, chosen by UCB1 on what they brought so far.

    ``arms`` are policies of this folder that end a chain and remember nothing; only their rules are used, not their
    lengths. A cycle's reward is ``blend`` * accepted / ``most`` + (1 - ``blend``) * accepted / drafted. The paper's arms are
    rules on the top-1 probability and on the entropy; the four here are Kangaroo's, SVIP's, AdaEDL's bound at a fixed
    threshold of 0.6, and the path probability.
    """

    arms: tuple[str, ...] = ("kangaroo", "svip", "svip(scale=0.2, threshold=0.4)", "survival")
    blend: float = 0.5
    exploration: float = 1.0
    most: int = 20

    needs = frozenset({"entropy"})
    scope = "stream"

    def __post_init__(self):
        require(len(self.arms) >= 2, self.name, "arms must name two or more stopping rules")
        fit = all(isinstance(rule, StoppingChain) and rule.scope == "cycle" and not rule.required_fit() for rule in self._rules)
        require(fit, self.name, "arms must be stopping rules without memory and without a fit, such as kangaroo or svip")
        require(0 <= self.blend <= 1, self.name, f"blend must lie between 0 and 1, not {self.blend}")
        require(self.exploration >= 0, self.name, f"exploration must be 0 or more, not {self.exploration}")
        require(self.most >= 1, self.name, f"most must be 1 or more, not {self.most}")

    @cached_property
    def _rules(self) -> list[StoppingChain]:
        return [load_policy(arm) for arm in self.arms]

    def init(self, rows: int, key: Tensor) -> State:
        """played, gained: float64 [1, K], how often each rule was played and the sum of its rewards."""
        nothing = torch.zeros((1, len(self.arms)), dtype=torch.float64, device=key.device)
        return {"played": nothing, "gained": nothing}

    def begin(self, cycle: Cycle, state: State) -> State:
        """arm: int64 [1]; the first of equally promising ones."""
        played = state["played"]
        rounds = played.sum(1, keepdim=True).clamp(min=1)
        bound = state["gained"] / played + self.exploration * (2 * torch.log(rounds) / played).sqrt()
        return state | {"arm": best(torch.where(played > 0, bound, 1e30).float(), 1)[:, 0]}

    def goes_on(self, tree: DraftTree, last: Tensor, cycle: Cycle, state: State) -> Tensor:
        return self._rules[int(state["arm"])].goes_on(tree, last, cycle, {})

    def observe(self, outcome: Outcome, cycle: Cycle, state: State) -> State:
        drafted, accepted = outcome.tree.size - 1, outcome.accepted.double()
        reward = self.blend * (accepted / self.most) + (1 - self.blend) * (accepted / drafted.clamp(min=1))
        learns = cycle.active & (drafted > 0)
        mine = torch.nn.functional.one_hot(state["arm"], len(self.arms))
        played = state["played"] + mine * learns.sum()
        return state | {"played": played, "gained": state["gained"] + mine * (reward * learns).cumsum(0)[-1:]}
