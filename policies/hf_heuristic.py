"""Hugging Face's heuristic schedule: a longer chain after a full success, a shorter one after a rejection.

``num_assistant_tokens_schedule="heuristic"`` of transformers (``AssistedCandidateGenerator.update_candidate_strategy``),
described in https://huggingface.co/blog/assisted-generation. The length outlives the request there, and here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policies.contract import Cycle, Outcome, State, require
from policies.registry import policy
from policies.sized import SizedChain, nothing_rejected


@policy("hf_heuristic", paper="https://huggingface.co/blog/assisted-generation")
class HfHeuristic(SizedChain):
    """A top-1 chain whose length grows by 2 when the target takes all of it, and shrinks by 1 (not below 1) otherwise.

    ``start`` is transformers' default ``num_assistant_tokens``. transformers knows no longest chain; ``most`` is the one
    that SVIP's comparison (https://arxiv.org/abs/2411.18462, released code) sets. It limits what is drafted, not the
    counter. Near the token limit transformers drafts less; this policy does not look at the limit.
    """

    start: int = 20
    grow: int = 2
    shrink: int = 1
    most: int = 40

    scope = "stream"

    def __post_init__(self):
        for name, least in {"start": 1, "grow": 0, "shrink": 0, "most": 1}.items():
            value = getattr(self, name)
            require(value >= least, self.name, f"{name} must be {least} or more, not {value}")

    def init(self, rows: int, key: Tensor) -> State:
        """length: int64 [1]."""
        return {"length": torch.full((1,), self.start, device=key.device)}

    def observe(self, outcome: Outcome, cycle: Cycle, state: State) -> State:
        """Rows that decode side by side count one after the other: x <- max(1, x + change), in closed form (Lindley)."""
        change = torch.where(nothing_rejected(outcome), self.grow, -self.shrink)
        change = change.masked_fill(~cycle.active | (outcome.tree.size == 1), 0)
        total = change.cumsum(0)
        return {"length": torch.maximum(state["length"] + total[-1:], 1 + (total[-1:] - total).amax(0, keepdim=True))}
