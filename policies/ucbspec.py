"""UCBSpec of BanditSpec: try each setting, then play the one that might be best.

Hou et al. 2025, "BanditSpec: Adaptive Speculative Decoding via Bandit Algorithms" (https://arxiv.org/abs/2505.15141),
UCBSpec: an upper confidence bound on the tokens a setting emits per cycle, which minimises the number of cycles of a
request. The authors' code (generate_utils.py) rewards throughput instead (``gain="speed"``, with the cost model's time), and adds
the same to every arm: sqrt(6.0 log t / plays of all arms together), which decides nothing. Once each arm was tried, twice but for
the last, it plays the best mean so far; ``gain="speed", exploration=0`` comes closest to it.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from policies.arms import GAINS, Arms, emitted
from policies.contract import Cycle, Expansion, Outcome, Policy, State, require
from policies.order import best
from policies.registry import policy
from policies.tree import DraftTree


@policy("ucbspec", paper="https://arxiv.org/abs/2505.15141")
class UcbSpec(Policy):
    """A bandit over chain lengths, or over EAGLE-3 settings (total_tokens, depth, top_k), by upper confidence bounds.

    Each request learns afresh. The default arms are those of the authors' code. The bound of an arm that was played n
    times of t is mean + L / 2 * sqrt((1 + n) / n**2 * (1 + 2 log(K t**2 sqrt(1 + n) / delta))), L being the deepest arm's
    depth; ``exploration`` scales what is added to the mean. We know of no published value of ``delta``; the 6.0 of the
    authors' code is of another bound.
    """

    arms: tuple = (1, 2, 3, 4)
    gain: str = "tokens"
    delta: float = 0.1
    exploration: float = 1.0

    scope = "sequence"

    def __post_init__(self):
        Arms.check(self.arms, self.name)
        require(self.gain in GAINS, self.name, f"gain must be {' or '.join(GAINS)}, not '{self.gain}'")
        require(0 < self.delta < 1, self.name, f"delta must lie between 0 and 1, not {self.delta}")
        require(self.exploration >= 0, self.name, f"exploration must be 0 or more, not {self.exploration}")

    @cached_property
    def _arms(self) -> Arms:
        return Arms(self.arms)

    def init(self, rows: int, key: Tensor) -> State:
        """played, gained: float64 [B, K], how often each arm was played and what it brought."""
        nothing = torch.zeros((rows, len(self.arms)), dtype=torch.float64, device=key.device)
        return {"played": nothing, "gained": nothing}

    def begin(self, cycle: Cycle, state: State) -> State:
        """arm: int64 [B]; the lowest of equally promising ones."""
        played = state["played"]
        bound = state["gained"] / played + self.exploration * self._radius(played)
        bound = torch.where(played > 0, bound, 1e30)
        return state | {"arm": best(bound.float(), 1)[:, 0]}

    def _radius(self, played: Tensor) -> Tensor:
        rounds = played.sum(1, keepdim=True) + 1  # whole numbers: exact in any order
        confidence = len(self.arms) / self.delta * rounds * rounds * (1 + played).sqrt()
        return self._arms.deepest / 2 * ((1 + played) / (played * played) * (1 + 2 * torch.log(confidence))).sqrt()

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        return self._arms.expand(tree, state["arm"])

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        return self._arms.select(tree, state["arm"])

    def observe(self, outcome: Outcome, cycle: Cycle, state: State) -> State:
        worth = self._arms.worth(self.gain, cycle, self.name)
        mine = torch.nn.functional.one_hot(state["arm"], len(self.arms)) * cycle.active[:, None]
        played, gained = state["played"] + mine, state["gained"] + mine * (emitted(outcome)[:, None] * worth)
        return state | {"played": played, "gained": gained}
