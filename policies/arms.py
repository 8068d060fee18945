"""What an online learner chooses from: chain lengths, or settings of EAGLE-3's tree. Each row plays its own."""

from __future__ import annotations

import torch
from torch import Tensor

from policies.contract import Cycle, Expansion, Outcome, require
from policies.eagle3 import most_probable
from policies.errors import UserError
from policies.order import NONE
from policies.tree import DraftTree

GAINS = ("tokens", "speed")


class Arms:
    """K settings, as tensors: total_tokens (root included), depth, top_k, int64 [K] each.

    A whole number k is a top-1 chain of k tokens; a triple is (total_tokens, depth, top_k) of EAGLE-3.
    """

    def __init__(self, arms: tuple):
        triples = torch.tensor([(arm + 1, arm, 1) if isinstance(arm, int) else arm for arm in arms])
        self.total_tokens, self.depth, self.top_k = triples.unbind(1)
        self.count, self.deepest, self.widest = len(arms), int(self.depth.max()), int(self.top_k.max())
        self.one_width = bool((self.top_k == self.widest).all())

    @staticmethod
    def check(arms: tuple, policy: str) -> None:
        """Raise a UserError unless ``arms`` are two or more settings."""
        told = "arms must be chain lengths such as (1, 2, 4) or triples (total_tokens, depth, top_k), all 1 or more"
        whole = [(arm,) if isinstance(arm, int) else arm for arm in arms]
        fine = all(isinstance(arm, tuple) and len(arm) in (1, 3) for arm in whole)
        fine = fine and all(isinstance(value, int) and value >= 1 for arm in whole for value in arm)
        require(fine, policy, told)
        require(len(arms) >= 2, policy, "arms must name two or more settings to choose from")

    def expand(self, tree: DraftTree, arm: Tensor) -> Expansion | None:
        """EAGLE-3's expansion under each row's ``arm`` int64 [B]."""
        if tree.levels == self.deepest:
            return None
        depth, top_k = self.depth.to(arm.device)[arm], self.top_k.to(arm.device)[arm]
        nodes = tree.frontier(self.widest)
        place = torch.arange(nodes.shape[1], device=arm.device)
        nodes = nodes.masked_fill((place >= top_k[:, None]) | (depth <= tree.levels)[:, None], NONE)
        return Expansion(nodes, self.widest if self.one_width else top_k[:, None].expand_as(nodes))

    def select(self, tree: DraftTree, arm: Tensor) -> Tensor:
        """EAGLE-3's re-ranking under each row's ``arm`` int64 [B]: bool [B, N]."""
        return most_probable(tree, self.total_tokens.to(arm.device)[arm] - 1)

    def time_ms(self, cycle: Cycle) -> Tensor:
        """A whole cycle of each arm under the cost model, float64 [B, K], for a request that decodes alone."""
        device = cycle.sequence.device
        depth, top_k, tokens = (values.to(device)[None] for values in (self.depth, self.top_k, self.total_tokens))
        context, cost, one = cycle.context_length[:, None], cycle.cost, torch.ones_like(depth)
        time = cost.catch_up_ms(one, context, one) + (depth - 1) * cost.draft_ms(top_k, context, one)
        time = time + cost.verify_ms(tokens, context, one) + cost.commit_ms(one, one)
        return time + cost.overhead_ms(depth, one)

    def worth(self, gain: str, cycle: Cycle, policy: str) -> Tensor:
        """What one emitted token of each arm counts, float64 [B, K] in (0, 1].

        "tokens": 1. "speed": the cheapest arm's time over this arm's, so that gains are tokens per unit of time.
        """
        if gain == "tokens":
            return torch.ones((len(cycle.sequence), self.count), dtype=torch.float64, device=cycle.sequence.device)
        if cycle.cost is None:
            raise UserError(f"policy '{policy}' with gain=speed needs a cost model: pass --profile FILE, or choose gain=tokens")
        time = self.time_ms(cycle)
        return time.amin(1, keepdim=True) / time


def emitted(outcome: Outcome) -> Tensor:
    """Tokens of the cycle, float64 [B]: the accepted ones and the target's own."""
    return outcome.accepted.double() + 1
