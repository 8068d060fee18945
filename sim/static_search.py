"""The best static setting: fixed chains, EAGLE-3's grid and fixed trees, chosen by predicted ms per token.

A static setting spends the same everywhere. The best of them, chosen on a training part of the texts, is what an adaptive
policy has to beat on the others; *same-budget static* is the static tree that verifies as many nodes on average.

The grid (depth 2..12, tokens 4..80, top-k 4, 8, 10) is searched from coarse to fine: around the best coarse points all
neighbours are tried until none is better. :class:`Family` is where replays come from: one that replays many settings at a
time can take its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from policies.chain import Chain
from policies.contract import Policy
from policies.cost import Cost
from policies.eagle3 import Eagle3
from policies.errors import UserError
from sim.replay import CycleLog, replay
from sim.texts import TextSums, over_domains, text_sums
from traces.recording import Recording

DEPTHS = tuple(range(2, 13))
TOKENS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 60, 70, 80)
TOP_KS = (4, 8, 10)
CHAINS = tuple(range(1, 13))
COARSE = tuple((depth, tokens, top_k) for depth in (2, 4, 7, 10) for tokens in (6, 16, 40) for top_k in (4, 10))

Replays = Callable[[Recording, Sequence[Policy], str | None, torch.Tensor], Iterable[CycleLog]]
"""Replays each policy over the given sequences (indices int64): one log per policy, in order."""


def one_by_one(
    recording: Recording, policies: Sequence[Policy], drafter: str | None, sequences: torch.Tensor
) -> Iterable[CycleLog]:
    """The plainest :data:`Replays`."""
    return (replay(recording, policy, drafter, sequences=sequences) for policy in policies)


@dataclass
class Family:
    """Replays of static settings over some texts of a recording, each done once and priced on demand.

    sequences  indices int64 of the texts
    replays    how they are replayed
    """

    recording: Recording
    sequences: np.ndarray
    drafter: str | None = None
    replays: Replays = one_by_one

    def __post_init__(self):
        self._logs: dict[Policy, CycleLog] = {}

    def logs(self, policies: Sequence[Policy]) -> list[CycleLog]:
        new = [policy for policy in dict.fromkeys(policies) if policy not in self._logs]
        found = self.replays(self.recording, new, self.drafter, torch.as_tensor(self.sequences))
        self._logs |= dict(zip(new, found, strict=True))
        return [self._logs[policy] for policy in policies]

    def sums(self, policies: Sequence[Policy], cost: Cost | None = None) -> list[TextSums]:
        return [text_sums(log, len(self.recording.length), cost) for log in self.logs(policies)]

    def covered(self, policies: Sequence[Policy]) -> list[bool]:
        """Whether the recording holds everything that each wants; others do not compete."""
        return [log.coverage == 1.0 for log in self.logs(policies)]

    def ms_per_token(self, policies: Sequence[Policy], cost: Cost) -> list[float]:
        """Predicted milliseconds per token, the mean over domains; infinite where the recording lacks something."""
        domain = np.asarray(self.recording.domain_index)
        times = [over_domains(sums.ms, sums.emitted, domain) for sums in self.sums(policies, cost)]
        return [ms if fine else float("inf") for ms, fine in zip(times, self.covered(policies), strict=True)]


@dataclass(frozen=True)
class Found:
    """A static setting and its predicted ms per token on the texts that it was chosen on."""

    policy: Policy
    ms_per_token: float


def best_static(family: Family, cost: Cost, more: Sequence[Policy] = ()) -> Found:
    """The best of fixed chains, the EAGLE-3 grid and ``more`` (such as Sequoia's trees for this pair and machine)."""
    chains = _fastest(family, cost, [Chain(k) for k in CHAINS] + list(more))
    grid = _best_of_grid(family, cost)
    found = min(chains, grid, key=lambda found: found.ms_per_token)
    if found.ms_per_token == float("inf"):
        raise UserError("the recording covers no static setting: record it again with the default --cover")
    return found


def same_budget(family: Family, kept: float, depths: Sequence[int] = (4, 6, 8)) -> Policy:
    """The EAGLE-3 setting whose mean number of kept nodes is ``kept``, rounded, and whose tau is the best.

    Trees verify all the nodes that they are given but at the context's end, so total_tokens is that number and the root.
    """
    tokens = max(round(kept) + 1, 1)
    grid = [Eagle3(tokens, depth, top_k) for depth in depths for top_k in TOP_KS]
    domain = np.asarray(family.recording.domain_index)
    tau = [over_domains(sums.emitted, sums.cycles, domain) for sums in family.sums(grid)]
    fine = family.covered(grid)
    return max(zip(grid, tau, fine, strict=True), key=lambda one: (one[2], one[1]))[0]


def _fastest(family: Family, cost: Cost, policies: Sequence[Policy]) -> Found:
    times = family.ms_per_token(policies, cost)
    place = min(range(len(times)), key=times.__getitem__)
    return Found(policies[place], times[place])


def _best_of_grid(family: Family, cost: Cost, starts: int = 2) -> Found:
    """From the best coarse points to the neighbours of neighbours, until nothing is faster."""
    coarse = [Eagle3(tokens, depth, top_k) for depth, tokens, top_k in COARSE]
    times = family.ms_per_token(coarse, cost)
    climbed = []
    for place in sorted(range(len(times)), key=times.__getitem__)[:starts]:
        best = Found(coarse[place], times[place])
        while (step := _fastest(family, cost, _neighbours(best.policy))).ms_per_token < best.ms_per_token:
            best = step
        climbed.append(best)
    return min(climbed, key=lambda found: found.ms_per_token)


def _neighbours(setting: Eagle3) -> list[Eagle3]:
    """Settings one or two grid steps away along one axis, and one step along depth and tokens together."""

    def near(values: Sequence[int], value: int, reach: int) -> list[int]:
        place = values.index(value)
        return list(values[max(place - reach, 0) : place + reach + 1])

    depth, tokens, top_k = setting.depth, setting.total_tokens, setting.top_k
    around = {(d, n, top_k) for d in near(DEPTHS, depth, 1) for n in near(TOKENS, tokens, 1)}
    around |= {(d, tokens, top_k) for d in near(DEPTHS, depth, 2)} | {(depth, n, top_k) for n in near(TOKENS, tokens, 2)}
    around |= {(depth, tokens, k) for k in TOP_KS}
    return [Eagle3(n, d, k) for d, n, k in sorted(around)]
