"""Cascade: try chain lengths for a while, keep the most useful one for a while, and do not speculate where none is.

Saxena et al. 2025, "Utility-Driven Speculative Decoding for Mixture-of-Experts" (https://arxiv.org/abs/2506.20675). The
utility of a length is what it gains over what it costs: tokens per cycle, over the cycle's time in plain steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policies.contract import Cycle, Outcome, State, require
from policies.registry import policy
from policies.serving_batch import ServingBatches
from policies.sized import SizedChain
from policies.step_time import chain_ms, cost_of


@policy("cascade", paper="https://arxiv.org/abs/2506.20675")
class Cascade(SizedChain):
    """A top-1 chain per request: test phases try each length from 1 to ``most``, set phases keep the one of most utility.

    A test phase decodes ``samples`` cycles at each length, a set phase ``hold`` cycles; where no utility reaches 1, without
    a draft. Times come from the cost model, for as many requests as the batch has. The values are those of a third-party
    implementation in vLLM, restated; the paper's own phases may differ.
    """

    most: int = 5
    samples: int = 5
    hold: int = 10

    scope = "sequence"
    batch_wide = True

    def __post_init__(self):
        for name in ("most", "samples", "hold"):
            value = getattr(self, name)
            require(value >= 1, self.name, f"{name} must be 1 or more, not {value}")

    def init(self, rows: int, key: Tensor) -> State:
        """length, left: int64 [B], the present length and how many cycles it stays; testing: bool [B];
        gained, spent: float64 [B, most], tokens and plain steps' worth of time at each length in this test phase."""
        one = torch.ones(rows, dtype=torch.int64, device=key.device)
        nothing = torch.zeros((rows, self.most), dtype=torch.float64, device=key.device)
        return {"length": one, "left": self.samples * one, "testing": one > 0, "gained": nothing, "spent": nothing}

    def observe(self, outcome: Outcome, cycle: Cycle, state: State) -> State:
        length, testing = state["length"], state["testing"]
        here = torch.nn.functional.one_hot((length - 1).clamp(min=0), self.most) * (testing & cycle.active)[:, None]
        gained = state["gained"] + here * (outcome.accepted + 1)[:, None]
        spent = state["spent"] + here * self._plain_steps(cycle)
        left = state["left"] - cycle.active.long()
        over = left == 0
        utility = gained / spent  # of lengths that were not tried NaN; looked at only when all were
        chosen = torch.where(utility.amax(1) >= 1, utility.argmax(1) + 1, 0)
        last = testing & (length == self.most)
        next_length = torch.where(testing, torch.where(last, chosen, length + 1), 1)
        next_testing = ~last
        fresh = (over & ~testing)[:, None]
        return {
            "length": torch.where(over, next_length, length),
            "left": torch.where(over, torch.where(next_testing, self.samples, self.hold), left),
            "testing": torch.where(over, next_testing, testing),
            "gained": gained.masked_fill(fresh, 0.0),
            "spent": spent.masked_fill(fresh, 0.0),
        }

    def _plain_steps(self, cycle: Cycle) -> Tensor:
        """Time of cycles of 1 to ``most`` tokens over that of a plain one, float64 [B, most]."""
        batches = ServingBatches(cycle)
        ms = chain_ms(cost_of(cycle, self.name), batches, torch.arange(self.most + 1, device=cycle.group.device))
        return batches.to_rows(ms[:, 1:] / ms[:, :1])
