"""HedgeSpec: score every setting on what one verification taught, and play in proportion to their regrets.

Liu et al. 2025, "Not-a-Bandit: Provably No-Regret Drafter Selection in Speculative Decoding for LLMs"
(https://arxiv.org/abs/2510.20064), with NormalHedge (Chaudhuri, Freund and Hsu 2009, "A Parameter-free Hedging Algorithm",
https://arxiv.org/abs/0903.2851), which has no learning rate to tune.

There all experts are known after each verification because each can be run on the verified text at leisure. A policy
cannot run the draft again, so here a setting is known only where its tree lies inside the one that was verified: the
others sleep for that cycle. A setting that is no deeper and no larger than the one played is always known.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from policies.arms import GAINS, Arms
from policies.contract import Cycle, Expansion, Outcome, Policy, State, require
from policies.exp3spec import STREAM, normalised
from policies.order import best
from policies.philox import draw, uniform
from policies.registry import policy
from policies.tree import DraftTree

HALVINGS = 60


@policy("hedgespec", paper="https://arxiv.org/abs/2510.20064")
class HedgeSpec(Policy):
    """A hedge over chain lengths, or over EAGLE-3 settings (total_tokens, depth, top_k) that share one top_k.

    Each request learns afresh. A known setting's loss is 1 - gain / (L + 1), L being the deepest one's depth; its regret
    grows by the known settings' mean loss (weighted as they were played) less its own. ``gain`` as in ucbspec.
    """

    arms: tuple = (1, 2, 3, 4)
    gain: str = "tokens"
    seed: int = 0

    scope = "sequence"

    def __post_init__(self):
        Arms.check(self.arms, self.name)
        widths = {1 if isinstance(arm, int) else arm[2] for arm in self.arms}
        require(len(widths) == 1, self.name, "arms must share one top_k: a narrower tree is not part of a wider one")
        require(self.gain in GAINS, self.name, f"gain must be {' or '.join(GAINS)}, not '{self.gain}'")

    @cached_property
    def _arms(self) -> Arms:
        return Arms(self.arms)

    def init(self, rows: int, key: Tensor) -> State:
        """regret: float64 [B, K]."""
        return {"regret": torch.zeros((rows, len(self.arms)), dtype=torch.float64, device=key.device)}

    def begin(self, cycle: Cycle, state: State) -> State:
        """arm: int64 [B]."""
        arm = draw(normal_hedge(state["regret"]), uniform(self.seed, cycle.sequence, cycle.number, STREAM))
        return state | {"arm": arm}

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        return self._arms.expand(tree, state["arm"])

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        return self._arms.select(tree, state["arm"])

    def observe(self, outcome: Outcome, cycle: Cycle, state: State) -> State:
        accepted, known = self.counterfactual(outcome, cycle, state["arm"])
        gain = (accepted + 1).double() * self._arms.worth(self.gain, cycle, self.name)
        loss = 1 - gain / (self._arms.deepest + 1)
        weight = normal_hedge(state["regret"]) * known
        asleep = ~(weight > 0).any(1, keepdim=True)
        share = normalised(torch.where(asleep, known.double(), weight))
        mean = torch.zeros_like(loss[:, 0])
        for index in range(self._arms.count):
            mean = mean + share[:, index] * loss[:, index]
        change = (mean[:, None] - loss).masked_fill(~known | ~cycle.active[:, None], 0)
        return state | {"regret": state["regret"] + change}

    def counterfactual(self, outcome: Outcome, cycle: Cycle, arm: Tensor) -> tuple[Tensor, Tensor]:
        """(accepted int64 [B, K], known bool [B, K]): what each arm would have had accepted, where that is known."""
        tree, arms = outcome.tree, self._arms
        verified, depth = arms.select(tree, arm), arms.depth.to(arm.device)
        accepted, known = [], []
        for index in range(arms.count):
            inside = tree.depth <= depth[index]
            kept = most_probable_within(tree, inside, int(arms.total_tokens[index]) - 1)
            known.append((depth[index] <= depth[arm]) & ~(kept & ~verified).any(1))
            accepted.append((kept & (outcome.status == 1)).sum(1))
        return torch.stack(accepted, dim=1), torch.stack(known, dim=1)


def most_probable_within(tree: DraftTree, inside: Tensor, count: int) -> Tensor:
    """EAGLE-3's choice of ``count`` nodes out of those ``inside`` bool [B, N], as if the others had not been drafted."""
    kept = torch.zeros_like(inside)
    place = best(tree.score.masked_fill(~(tree.drafted() & inside), -torch.inf), min(count, tree.width))
    return kept.scatter(1, place.clamp(min=0), place >= 0)


def normal_hedge(regret: Tensor) -> Tensor:
    """NormalHedge's weights float64 [B, K] of regrets [B, K]: in proportion to [R]+ / c * exp([R]+ ** 2 / (2 c)).

    c solves mean(exp([R]+ ** 2 / (2 c))) = e, found by halving its bracket: the largest term lies between e and e * K.
    Uniform where no regret is positive.
    """
    positive = regret.clamp(min=0)
    largest = positive.amax(1)
    square = (positive / largest.clamp(min=1e-300)[:, None]) ** 2 / 2  # c in units of the largest squared regret
    count = regret.shape[1]
    low = torch.full_like(largest, 0.5 / (1 + math.log(count)))
    high = torch.full_like(largest, 0.5)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        total = torch.zeros_like(middle)
        for index in range(count):
            total = total + torch.exp((square[:, index] / middle).contiguous())
        too_small = total > count * math.e
        low, high = torch.where(too_small, middle, low), torch.where(too_small, high, middle)
    weight = positive * torch.exp(square / high[:, None])
    return normalised(torch.where(largest[:, None] > 0, weight, 1.0))
