"""SGLang's adaptive steps: a chain length from a few candidates, moved by an average of what was accepted.

``AdaptiveSpeculativeParams`` of SGLang (https://github.com/sgl-project/sglang/pull/21599 and follow-ups; documented in
https://docs.sglang.io/docs/advanced_features/adaptive_speculative_decoding): every range of batch sizes, a *tier*, has its
own candidates, average and present length, and learns only from steps of its batch sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policies.contract import Cycle, Outcome, State, require
from policies.registry import policy
from policies.serving_batch import ServingBatches, tier_of
from policies.sized import SizedChain


@policy("sglang_ema", paper="https://github.com/sgl-project/sglang/pull/21599")
class SglangEma(SizedChain):
    """A top-1 chain whose length follows a moving average of accepted tokens, among the candidates of its batch size.

    ``tiers``: (smallest batch, candidate lengths, what is added to the thresholds for going down); ``up`` is added to those
    for going up. After ``warm_up`` steps, every ``interval`` steps: down while the average is at or below the next shorter
    candidate - 0.5 (+ 0.5 if that is 0), else up while it is above the present one - 0.5. From 0 the next candidate is
    tried. ``smoothing`` weighs the newest step; ``start`` is the first length, or a tier's middle one where it is no
    candidate. All defaults but ``start`` are SGLang's.
    """

    tiers: tuple = ((1, (1, 3, 5, 7), -0.25), (8, (0, 1, 3), 0.0), (32, (0, 1), 0.0), (64, (0,), 0.0))
    start: int = 3
    smoothing: float = 0.2
    warm_up: int = 10
    interval: int = 5
    up: float = 0.0

    scope = "stream"
    batch_wide = True

    def __post_init__(self):
        told = "tiers must be triples (smallest batch, ascending lengths, hysteresis) by ascending batch"
        triples = all(isinstance(tier, tuple) and len(tier) == 3 and isinstance(tier[1], tuple) for tier in self.tiers)
        require(triples and len(self.tiers) > 0, self.name, told)
        sizes = [size for size, _, _ in self.tiers]
        require(sizes == sorted(set(sizes)) and sizes[0] >= 1, self.name, told)
        fine = all(lengths and lengths == tuple(sorted(set(lengths))) and lengths[0] >= 0 for _, lengths, _ in self.tiers)
        require(fine, self.name, told)
        require(0 <= self.smoothing <= 1, self.name, f"smoothing must lie between 0 and 1, not {self.smoothing}")
        for name, least in {"start": 0, "warm_up": 0, "interval": 1}.items():
            value = getattr(self, name)
            require(value >= least, self.name, f"{name} must be {least} or more, not {value}")

    @property
    def most(self) -> int:
        return max(lengths[-1] for _, lengths, _ in self.tiers)

    def init(self, rows: int, key: Tensor) -> State:
        """Per tier [1, T]: present length and steps seen, int64; average of accepted tokens, float64."""
        first = [self.start if self.start in lengths else lengths[len(lengths) // 2] for _, lengths, _ in self.tiers]
        present = torch.tensor([first], device=key.device)
        return {"present": present, "average": present.double() - 1, "steps": torch.zeros_like(present)}

    def begin(self, cycle: Cycle, state: State) -> State:
        """length: int64 [B]."""
        batches = ServingBatches(cycle)
        return state | {"length": batches.to_rows(state["present"][0, self._tier(batches.size)])}

    def observe(self, outcome: Outcome, cycle: Cycle, state: State) -> State:
        """All active rows are one step: a stream decodes one serving batch at a time."""
        rows = int(cycle.active.sum())
        if not rows:
            return state
        tier = int(self._tier(cycle.active.sum().view(1)))
        present, average = int(state["present"][0, tier]), float(state["average"][0, tier])
        if present > 0:
            accepted = int((outcome.accepted * cycle.active).sum()) / rows
            average = (1 - self.smoothing) * average + self.smoothing * accepted
        steps = int(state["steps"][0, tier]) + 1
        if steps > self.warm_up and (steps - self.warm_up) % self.interval == 0:
            present, average = self._moved(tier, present, average)
        changed = {"present": present, "average": average, "steps": steps}
        learned = {name: state[name].clone() for name in changed}
        for name, value in changed.items():
            learned[name][0, tier] = value
        return state | learned

    def _moved(self, tier: int, present: int, average: float) -> tuple[int, float]:
        """The tier's length and average after a look at the average."""
        _, lengths, down = self.tiers[tier]
        place = before = lengths.index(present)
        if present == 0:
            probe = lengths[min(1, len(lengths) - 1)]
            return probe, float(probe - 1) if probe > 0 and average < 0 else average
        while place > 0 and average <= (lengths[place - 1] - 0.5 if lengths[place - 1] else 0.5) + down:
            place -= 1
        while place >= before and place < len(lengths) - 1 and average > lengths[place] - 0.5 + self.up:
            place += 1
        return lengths[place], average

    def _tier(self, size: Tensor) -> Tensor:
        """The tier int64 [n] of batches of ``size`` int64 [n]."""
        return tier_of(size, [smallest for smallest, _, _ in self.tiers])
