"""SmartSpec's goodput: the chain length that is expected to emit most tokens per millisecond, for the whole batch.

Liu et al. 2024, "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput"
(https://arxiv.org/abs/2406.14066), section 4; TurboSpec is its later name. With a moving average a of the chance that a token
is accepted, a chain of k emits (1 - a^(k+1)) / (1 - a) tokens; the step's time comes from a profile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policies.contract import Cycle, Outcome, State, require
from policies.registry import policy
from policies.serving_batch import ServingBatches
from policies.sized import SizedChain
from policies.step_time import chain_ms, cost_of


@policy("smartspec", paper="https://arxiv.org/abs/2406.14066")
class SmartSpec(SizedChain):
    """A top-1 chain, as long for all requests of the batch as maximises expected tokens over the step's time.

    The acceptance rate is a moving average over steps of accepted over tested tokens, ``start`` at first; ``smoothing``
    weighs the newest step. Steps without a draft teach nothing, so after ``probe`` of them one token is drafted: else a
    stream that has stopped would never start again. ``most`` is the longest chain. We know of no published values; these
    are ours.
    """

    most: int = 8
    smoothing: float = 0.1
    start: float = 0.7
    probe: int = 20

    scope = "stream"
    batch_wide = True

    def __post_init__(self):
        require(self.most >= 1, self.name, f"most must be 1 or more, not {self.most}")
        require(self.probe >= 1, self.name, f"probe must be 1 or more, not {self.probe}")
        for name in ("smoothing", "start"):
            value = getattr(self, name)
            require(0 <= value <= 1, self.name, f"{name} must lie between 0 and 1, not {value}")

    def init(self, rows: int, key: Tensor) -> State:
        """acceptance: float64 [1]; idle: int64 [1], steps since a draft was tested."""
        acceptance = torch.full((1,), self.start, dtype=torch.float64, device=key.device)
        return {"acceptance": acceptance, "idle": torch.zeros(1, dtype=torch.int64, device=key.device)}

    def begin(self, cycle: Cycle, state: State) -> State:
        """length: int64 [B], the shortest of equally good ones."""
        batches = ServingBatches(cycle)
        ms = chain_ms(cost_of(cycle, self.name), batches, torch.arange(self.most + 1, device=cycle.group.device))
        tokens = [torch.ones_like(state["acceptance"])]
        while len(tokens) <= self.most:  # the geometric sum, term by term
            tokens.append(1 + state["acceptance"] * tokens[-1])
        length = (torch.stack(tokens, dim=1) / ms).argmax(1)
        return state | {"length": batches.to_rows(length.clamp(min=int(state["idle"] >= self.probe)))}

    def observe(self, outcome: Outcome, cycle: Cycle, state: State) -> State:
        """All active rows are one step: a stream decodes one serving batch at a time."""
        active = cycle.active[:, None]
        tested = int(((outcome.status >= 0) & active).sum())
        if not tested:
            return state | {"idle": state["idle"] + 1}
        accepted = int(((outcome.status == 1) & active).sum()) / tested
        acceptance = (1 - self.smoothing) * state["acceptance"] + self.smoothing * accepted
        return state | {"acceptance": acceptance, "idle": torch.zeros_like(state["idle"])}
