"""SGLang's throughput-aware steps: the candidate length with the most expected tokens per measured millisecond.

``ThroughputAwareAdaptiveController`` of SGLang (https://github.com/sgl-project/sglang/pull/28045): the share of requests
that accept more than k tokens is averaged over the last steps for every k, and extrapolated geometrically where no step
reached; the time of a step by batch size and length was profiled at startup.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policies.contract import Cycle, Outcome, State, require
from policies.registry import policy
from policies.serving_batch import ServingBatches, tier_of
from policies.sized import SizedChain
from policies.step_time import chain_ms, cost_of
from policies.sums import ordered_sum


@policy("sglang_throughput", paper="https://github.com/sgl-project/sglang/pull/28045")
class SglangThroughput(SizedChain):
    """A top-1 chain, chosen among the candidates of its batch size by expected tokens over the step's time.

    ``tiers``: (smallest batch, candidate lengths). Candidates are compared anew every ``interval`` steps, once the last
    ``window`` steps are known of every place in the present chain; another one must be better by the share ``margin``.
    ``start`` is the first length. Tiers are the documented example, the others SGLang's defaults but ``start``.
    """

    tiers: tuple = ((1, (1, 3, 5, 7)), (8, (1, 3, 5)), (32, (1, 3)), (128, (1,)))
    start: int = 3
    window: int = 20
    interval: int = 10
    margin: float = 0.0

    scope = "stream"
    batch_wide = True

    def __post_init__(self):
        told = "tiers must be pairs (smallest batch, lengths of 1 or more) by ascending batch"
        pairs = all(isinstance(tier, tuple) and len(tier) == 2 and isinstance(tier[1], tuple) for tier in self.tiers)
        require(pairs and len(self.tiers) > 0, self.name, told)
        sizes = [size for size, _ in self.tiers]
        require(sizes == sorted(set(sizes)) and sizes[0] >= 1, self.name, told)
        require(all(lengths and min(lengths) >= 1 for _, lengths in self.tiers), self.name, told)
        require(1 <= self.start <= self.most, self.name, f"start must lie between 1 and the longest candidate, not {self.start}")
        require(self.window >= 1, self.name, f"window must be 1 or more, not {self.window}")
        require(self.interval >= 1, self.name, f"interval must be 1 or more, not {self.interval}")
        require(self.margin >= 0, self.name, f"margin must be 0 or more, not {self.margin}")

    @property
    def most(self) -> int:
        return max(max(lengths) for _, lengths in self.tiers)

    def init(self, rows: int, key: Tensor) -> State:
        """present, steps: int64 [1]; shares: float64 [1, most, window], newest last; known: int64 [1, most] of them."""
        one = torch.ones(1, dtype=torch.int64, device=key.device)
        shares = torch.zeros((1, self.most, self.window), dtype=torch.float64, device=key.device)
        known = torch.zeros((1, self.most), dtype=torch.int64, device=key.device)
        return {"present": self.start * one, "steps": 0 * one, "shares": shares, "known": known}

    def begin(self, cycle: Cycle, state: State) -> State:
        """length: int64 [B]; the present length is that of the batch with the lowest number, the only one of a stream."""
        cost, batches, present = cost_of(cycle, self.name), ServingBatches(cycle), int(state["present"])
        warm = bool((state["known"][0, :present] == self.window).all())
        steps = int(state["steps"])
        if not (warm and steps and steps % self.interval == 0):
            return state | {"length": torch.full_like(cycle.group, present)}
        lengths = torch.arange(1, self.most + 1, device=cycle.group.device)
        score = self._expected(state)[None] / chain_ms(cost, batches, lengths)
        candidate = self._candidates(batches.size)
        choice = score.masked_fill(~candidate, -torch.inf).argmax(1)  # the shortest of equally good ones
        better = score.gather(1, choice[:, None])[:, 0] > score[:, present - 1] * (1 + self.margin)
        chosen = torch.where(better | ~candidate[:, present - 1] | (self.margin == 0), choice + 1, present)
        beyond = lengths > chosen[0]
        known = state["known"].masked_fill(beyond & (chosen[0] < present), 0)
        return state | {"length": batches.to_rows(chosen), "present": chosen[:1], "known": known}

    def observe(self, outcome: Outcome, cycle: Cycle, state: State) -> State:
        """All active rows are one step: a stream decodes one serving batch at a time."""
        rows = int(cycle.active.sum())
        if not rows:
            return state
        places = torch.arange(self.most, device=cycle.group.device)
        reached = ((outcome.accepted[:, None] > places) & cycle.active[:, None]).sum(0).double() / rows
        shifted = torch.cat([state["shares"][:, :, 1:], reached[None, :, None]], dim=2)
        inside = places < state["present"]
        shares = torch.where(inside[None, :, None], shifted, state["shares"])
        known = torch.where(inside, state["known"] + 1, state["known"]).clamp(max=self.window)
        return state | {"shares": shares, "known": known, "steps": state["steps"] + 1}

    def _expected(self, state: State) -> Tensor:
        """Tokens float64 [most] that chains of 1, 2, ... are expected to emit."""
        fresh = torch.arange(self.window, device=state["known"].device) >= self.window - state["known"][0, :, None]
        total = ordered_sum(state["shares"][0].masked_fill(~fresh, 0.0), self.window).tolist()
        rates: list[float] = []
        for sum_, known in zip(total, state["known"][0].tolist(), strict=True):
            if known:
                rates.append(sum_ / known)
            elif len(rates) == 1:
                rates.append(rates[0])
            else:
                fall = (rates[-1] / rates[0]) ** (1 / (len(rates) - 1)) if rates[0] > 0 else 0.0
                rates.append(min(rates[-1], rates[-1] * fall))
        expected = [1.0]
        for rate in rates:
            expected.append(expected[-1] + rate)
        return torch.tensor(expected[1:], dtype=torch.float64, device=state["known"].device)

    def _candidates(self, size: Tensor) -> Tensor:
        """bool [G, most]: the lengths 1, 2, ... that batches of ``size`` int64 [G] choose from."""
        table = torch.zeros((len(self.tiers), self.most), dtype=torch.bool)
        for place, (_, lengths) in enumerate(self.tiers):
            table[place, [length - 1 for length in lengths]] = True
        return table.to(size.device)[tier_of(size, [smallest for smallest, _ in self.tiers])]
