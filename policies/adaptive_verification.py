"""Adaptive verification of DSpark and vLLM: verify so many tokens of the whole batch as are worth the step's time.

DSpark (https://arxiv.org/abs/2607.05147) and vLLM's ``enable_adaptive_verification``
(https://docs.vllm.ai/en/stable/features/speculative_decoding/adaptive_verification/): every drafted token is scored by its
estimated survival, the product of acceptance estimates up to it; the n likeliest of all requests are verified, for the n
with the most expected tokens per millisecond. Estimates are vLLM's for drafts without a confidence head, learned while
serving (policies/online_acceptance.py). DSpark stops at the first n that is no improvement, since its drafts are sampled;
ours are not, so the best n of all is taken, as in vLLM. Ours is the better informed: vLLM chooses n by the estimates of the step
before (1 for new requests), so as not to wait for the GPU, and only which tokens they are by the current ones; here both are.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from policies.contract import Cycle, Expansion, Outcome, Policy, State, require
from policies.online_acceptance import OnlineAcceptance
from policies.registry import policy
from policies.serving_batch import ServingBatches
from policies.step_time import cost_of, packed_ms
from policies.sums import exact_cumsum
from policies.tree import DraftTree


@policy("adaptive_verification", paper="https://arxiv.org/abs/2607.05147")
class AdaptiveVerification(Policy):
    """Chains of ``most`` tokens, of which the batch verifies as many of the likeliest as maximise tokens over time.

    ``slope`` to ``ridge`` are those of `online_acceptance`: by default the first cycle already trusts the estimate; until
    ``warm_up`` refits are done everything is verified. A step pays for the tokens there are, packed (``--ragged sum``).
    """

    most: int = 8
    slope: float = 0.5
    intercept: float = -0.2
    refit: int = 100
    warm_up: int = 0
    damping: float = 50.0
    ridge: float = 1e-3

    scope = "stream"
    batch_wide = True

    def __post_init__(self):
        for name, least in {"most": 1, "refit": 1, "warm_up": 0, "damping": 0, "slope": 0}.items():
            value = getattr(self, name)
            require(value >= least, self.name, f"{name} must be {least} or more, not {value}")
        require(self.ridge > 0, self.name, f"ridge must be above 0, not {self.ridge}")

    @cached_property
    def _estimate(self) -> OnlineAcceptance:
        return OnlineAcceptance(
            threshold=0.0,
            slope=self.slope,
            intercept=self.intercept,
            refit=self.refit,
            warm_up=self.warm_up,
            damping=self.damping,
            ridge=self.ridge,
            most=self.most,
        )

    def init(self, rows: int, key: Tensor) -> State:
        return self._estimate.init(rows, key)

    def begin(self, cycle: Cycle, state: State) -> State:
        return self._estimate.begin(cycle, state)

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        return self._estimate.expand(tree, cycle, state)

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        cost, everything = cost_of(cycle, self.name), self._estimate.select(tree, cycle, state)
        if int(state["cycles"]) < self.warm_up * self.refit:
            return everything
        survival = state["survival"].gather(1, tree.depth.clamp(min=0)).float()
        batches = ServingBatches(cycle)
        entry, score = batches.ranked(survival.masked_fill(~tree.drafted(), -torch.inf))
        likely = score.masked_fill(entry < 0, 0.0).to(torch.float64)
        tokens = batches.size[:, None] + torch.arange(entry.shape[1] + 1, device=entry.device)
        expected = batches.size[:, None] + exact_cumsum(torch.nn.functional.pad(likely, (1, 0)))
        ms = packed_ms(cost, batches, self.most, tokens)
        worth = (expected / ms).masked_fill(tokens > batches.size[:, None] + (entry >= 0).sum(1, keepdim=True), -torch.inf)
        return batches.first(entry, worth.argmax(1), tree.width)

    def observe(self, outcome: Outcome, cycle: Cycle, state: State) -> State:
        return self._estimate.observe(outcome, cycle, state)
