"""SpecDec++: stop drafting when the chance that at least one token will be rejected is too large.

Huang, Guo and Wang 2024, "SpecDec++: Boosting Speculative Decoding via Adaptive Candidate Lengths"
(https://arxiv.org/abs/2405.19715), section 4: the best stopping rule is such a threshold. There a head trained on the
draft's hidden states estimates acceptance; here a calibrated estimate from the draft's distribution takes its place
(policies/acceptance.py), fitted by ``sim.fit``.

All tokens drafted so far count, as in the paper, which asks whether at least one of them will be rejected. The released code
(specdec_pp/hf_generation.py) decides without the newest one: the head reads a token's own hidden state, which there is only when
the draft runs on that token, one forward later. Under the same threshold its chains are up to a token longer than ours.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from policies.acceptance import WatchedChain, calibration_lines, chain_columns, estimate_last, fit_weights
from policies.contract import Cycle, Policy, State, require
from policies.registry import policy
from policies.stopping import StoppingChain
from policies.tree import DraftTree


@policy("specdec_pp", paper="https://arxiv.org/abs/2405.19715")
class SpecDecPp(StoppingChain):
    """A top-1 chain that ends when 1 minus the product of its tokens' acceptance estimates exceeds a threshold.

    At least ``least`` tokens are drafted. Defaults are those of the authors' command line (``--stop_threshold 0.3 --bound
    2 20``). ``rejection_weight`` counts rejected tokens more in the fit (the authors' head: 6); 1 keeps the estimate
    calibrated. ``weights_``: intercept, log-odds, entropy, depth.
    """

    threshold: float = 0.3
    least: int = 2
    most: int = 20
    rejection_weight: float = 1.0
    weights_: tuple[float, ...] | None = None

    needs = frozenset({"entropy"})

    def __post_init__(self):
        require(0 <= self.threshold <= 1, self.name, f"threshold must lie between 0 and 1, not {self.threshold}")
        require(1 <= self.least <= self.most, self.name, f"least must lie between 1 and most, not {self.least}")
        require(self.rejection_weight > 0, self.name, f"rejection_weight must be above 0, not {self.rejection_weight}")
        require(self.weights_ is None or len(self.weights_) == 4, self.name, f"weights_ must be 4 numbers, not {self.weights_}")

    def begin(self, cycle: Cycle, state: State) -> State:
        """survival: float64 [B], estimated chance that the target takes all tokens so far."""
        return {"survival": torch.ones_like(cycle.sequence, dtype=torch.float64)}

    def goes_on(self, tree: DraftTree, last: Tensor, cycle: Cycle, state: State) -> Tensor:
        survival = state["survival"] * estimate_last(self.weights_, tree, last)
        state["survival"] = torch.where(last[:, 0] > 0, survival, state["survival"])
        return (1 - state["survival"] <= self.threshold) | (tree.levels < self.least)

    def fit_base(self) -> Policy:
        return WatchedChain(self.most)

    def measure(self, tree: DraftTree, cycle: Cycle) -> dict[str, Tensor]:
        return chain_columns(tree, cycle, self.most)

    def fit(self, samples: Any) -> SpecDecPp:
        return replace(self, weights_=fit_weights(samples, self.rejection_weight))

    def describe_fit(self, samples: Any) -> list[str]:
        return calibration_lines(self.weights_, samples)
