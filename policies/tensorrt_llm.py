"""TensorRT-LLM's table and gate: a chain length by batch size, and an end to speculation where too little is accepted.

``draft_len_schedule`` (https://github.com/NVIDIA/TensorRT-LLM/pull/10860): the first entry whose batch size is not exceeded
gives the length; beyond the last nothing is drafted. ``acceptance_rate_window_size`` and ``acceptance_rate_threshold``:
once the mean acceptance rate of so many speculating steps is below the threshold, speculation is off for good.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policies.contract import Cycle, Outcome, State, require
from policies.registry import policy
from policies.serving_batch import ServingBatches
from policies.sized import SizedChain
from policies.sums import ordered_sum


@policy("tensorrt_llm", paper="https://github.com/NVIDIA/TensorRT-LLM/pull/10860")
class TensorRtLlm(SizedChain):
    """A top-1 chain as long as a table by batch size says, until the gate shuts.

    ``schedule``: pairs (largest batch, tokens), that of the pull request by default. A step's acceptance rate is accepted
    over drafted tokens of all its requests. ``window`` 0, the default, leaves the gate open, as there.
    """

    schedule: tuple = ((4, 4), (8, 2), (32, 1))
    window: int = 0
    threshold: float = 0.0

    scope = "stream"
    batch_wide = True

    def __post_init__(self):
        pairs = all(isinstance(pair, tuple) and len(pair) == 2 for pair in self.schedule)
        told = "schedule must be pairs (largest batch, tokens), batches ascending from 1, tokens 0 or more"
        require(pairs and len(self.schedule) > 0, self.name, told)
        require(all(isinstance(value, int) for pair in self.schedule for value in pair), self.name, told)
        sizes = [size for size, _ in self.schedule]
        require(sizes[0] >= 1 and sizes == sorted(set(sizes)) and min(k for _, k in self.schedule) >= 0, self.name, told)
        require(self.window >= 0, self.name, f"window must be 0 or more, not {self.window}")
        require(0 <= self.threshold <= 1, self.name, f"threshold must lie between 0 and 1, not {self.threshold}")

    @property
    def most(self) -> int:
        return max(tokens for _, tokens in self.schedule)

    def init(self, rows: int, key: Tensor) -> State:
        """rates: float64 [1, window], the newest last; steps: int64 [1], those that speculated; off: bool [1]."""
        steps = torch.zeros(1, dtype=torch.int64, device=key.device)
        rates = torch.zeros((1, self.window), dtype=torch.float64, device=key.device)
        return {"rates": rates, "steps": steps, "off": steps > 0}

    def begin(self, cycle: Cycle, state: State) -> State:
        """length: int64 [B]."""
        batches = ServingBatches(cycle)
        sizes, tokens = torch.tensor(self.schedule, device=cycle.group.device).T.contiguous()
        tokens = torch.nn.functional.pad(tokens, (0, 1))  # beyond the last entry
        length = tokens[torch.searchsorted(sizes, batches.size)].masked_fill(state["off"], 0)
        return state | {"length": batches.to_rows(length)}

    def observe(self, outcome: Outcome, cycle: Cycle, state: State) -> State:
        """All active rows are one step: a stream decodes one serving batch at a time."""
        drafted = int(((outcome.tree.size - 1) * cycle.active).sum())
        if not self.window or not drafted:
            return state
        rate = (outcome.accepted * cycle.active).sum().double() / drafted
        rates, steps = torch.cat([state["rates"][:, 1:], rate.view(1, 1)], dim=1), state["steps"] + 1
        low = (ordered_sum(rates, self.window) / self.window < self.threshold) & (steps >= self.window)
        return state | {"rates": rates, "steps": steps, "off": state["off"] | low}
