"""GammaTune: widen the chain after a full success, else go back to a moving average of what was accepted.

Gautam, Shrestha and Reddy 2025, "Token-Driven GammaTune: Adaptive Calibration for Enhanced Speculative Decoding"
(https://arxiv.org/abs/2504.00030). The rule and its constants follow a restatement of it, not the paper's own pseudo-code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policies.contract import Cycle, Outcome, State, require
from policies.registry import policy
from policies.sized import SizedChain, nothing_rejected


@policy("gammatune", paper="https://arxiv.org/abs/2504.00030")
class GammaTune(SizedChain):
    """A top-1 chain: ``widen`` longer than what was accepted after a full success, else the moving average, rounded up.

    ``smoothing`` weighs the newest accepted length in the average, which only rejections move. Lengths stay between
    ``least`` and ``most``. Without the logit-based early stop of GammaTune+.
    """

    start: int = 3
    smoothing: float = 0.3
    widen: int = 2
    least: int = 1
    most: int = 10

    scope = "sequence"

    def __post_init__(self):
        require(0 <= self.smoothing <= 1, self.name, f"smoothing must lie between 0 and 1, not {self.smoothing}")
        require(self.widen >= 0, self.name, f"widen must be 0 or more, not {self.widen}")
        require(1 <= self.least <= self.most, self.name, f"least must lie between 1 and most, not {self.least}")
        within = self.least <= self.start <= self.most
        require(within, self.name, f"start must lie between least and most, not {self.start}")

    def init(self, rows: int, key: Tensor) -> State:
        """length: int64 [B]; average: float64 [B], tokens."""
        length = torch.full((rows,), self.start, device=key.device)
        return {"length": length, "average": length.double()}

    def observe(self, outcome: Outcome, cycle: Cycle, state: State) -> State:
        accepted = outcome.accepted
        average = (1 - self.smoothing) * state["average"] + self.smoothing * accepted.double()
        average = torch.where(nothing_rejected(outcome), state["average"], average.clamp(self.least, self.most))
        wider = (accepted + self.widen).clamp(self.least, self.most)
        length = torch.where(nothing_rejected(outcome), wider, average.ceil().to(torch.int64))
        learns = cycle.active & (outcome.tree.size > 1)
        return {
            "length": torch.where(learns, length, state["length"]),
            "average": torch.where(learns, average, state["average"]),
        }
