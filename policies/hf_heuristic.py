"""Hugging Face's heuristic schedule: a longer chain after a full success, a shorter one after a rejection.

``num_assistant_tokens_schedule="heuristic"`` of transformers (``AssistedCandidateGenerator.update_candidate_strategy``, read in
5.23), described in https://huggingface.co/blog/assisted-generation. A chain ends early with the first token below
``assistant_confidence_threshold``, which is on by default; that token is verified, too, and a full success is one of the chain as
it was drafted. The length outlives the request there, and here.

What differs: with scikit-learn installed transformers refits the threshold as well (policies/hf_confidence.py, which also says
what probabilities it compares), here it stays; near the token limit it drafts less; and an accepted end of sequence, a full
success here, it counts as a failure.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from policies.contract import Cycle, Outcome, State, require
from policies.registry import policy
from policies.sized import nothing_rejected
from policies.stopping import StoppingChain
from policies.tree import DraftTree


@policy("hf_heuristic", paper="https://huggingface.co/blog/assisted-generation")
class HfHeuristic(StoppingChain):
    """A top-1 chain whose length grows by 2 when the target takes all of it, and shrinks by 1 (not below 1) otherwise.

    ``start`` is transformers' default ``num_assistant_tokens``, and ``threshold`` its default least draft probability behind
    which to go on (0 = off). transformers knows no longest chain; ``most`` limits what is drafted, not the counter, to what a
    recording holds (traces/cover.py). SVIP's comparison (https://arxiv.org/abs/2411.18462, released code) sets 40.
    """

    start: int = 20
    grow: int = 2
    shrink: int = 1
    threshold: float = 0.4
    most: int = 24

    scope = "stream"
    published = "hf_heuristic(most=40)"

    def __post_init__(self):
        for name, least in {"start": 1, "grow": 0, "shrink": 0, "most": 1}.items():
            value = getattr(self, name)
            require(value >= least, self.name, f"{name} must be {least} or more, not {value}")
        require(0 <= self.threshold <= 1, self.name, f"threshold must lie between 0 and 1, not {self.threshold}")

    def init(self, rows: int, key: Tensor) -> State:
        """length: int64 [1]."""
        return {"length": torch.full((1,), self.start, device=key.device)}

    def goes_on(self, tree: DraftTree, last: Tensor, cycle: Cycle, state: State) -> Tensor:
        least = math.log(self.threshold) if self.threshold else -math.inf
        return (tree.logprob.gather(1, last)[:, 0].double() >= least) & (state["length"] > tree.levels)

    def observe(self, outcome: Outcome, cycle: Cycle, state: State) -> State:
        """Rows that decode side by side count one after the other: x <- max(1, x + change), in closed form (Lindley)."""
        change = torch.where(nothing_rejected(outcome), self.grow, -self.shrink)
        change = change.masked_fill(~cycle.active | (outcome.tree.size == 1), 0)
        total = change.cumsum(0)
        return {"length": torch.maximum(state["length"] + total[-1:], 1 + (total[-1:] - total).amax(0, keepdim=True))}
