"""Sums of one replay, text by text: all that result rows, intervals and comparisons are made from.

A figure is a ratio of sums over the texts of a domain (tau is emitted tokens over cycles), and overall the mean over the
domains. Texts are the unit that intervals resample, so a tally keeps them apart; it is small, and a sweep stores it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sim.replay import CycleLog
from traces.recording import Recording

FIGURES = {
    "tau": ("emitted", "cycles"),
    "kept": ("kept", "cycles"),
    "verified": ("verified", "cycles"),
    "levels": ("levels", "cycles"),
    "coverage": ("covered", "cycles"),
    "ms_per_token": ("ms", "emitted"),
    "tokens_per_second": ("thousands", "machine_ms"),
    "speedup": ("plain_ms", "ms"),
}
"""Numerator and denominator of each figure; both are sums over texts."""
RATIOS = FIGURES | {"cycles_per_token": ("cycles", "emitted")}
"""Whatever can be asked for; rows of results show FIGURES alone."""
TIMES = ("ms_per_token", "tokens_per_second", "speedup")
"""Figures that need a cost model."""


@dataclass(frozen=True)
class Tally:
    """Sums of one replay, one entry per text [n], in the recording's order.

    sequence  int64 index of the text in the recording
    domain    int64 index into ``domains``
    sums      float64 [n] each: cycles, emitted, kept, verified (kept and root), levels, covered (cycles whose every
              expansion the recording holds), accepted; with a cost model also ms (what the request waited), machine_ms
              (its share of the steps' time), plain_ms (plain decoding of the same tokens) and thousands (1000 emitted)
    reached   float64 [n, D]: cycles that accepted at least d nodes, d = 1 .. D
    domains   names
    """

    sequence: np.ndarray
    domain: np.ndarray
    sums: dict[str, np.ndarray]
    reached: np.ndarray
    domains: list[str] = field(repr=False)

    @classmethod
    def joined(cls, parts: list[Tally]) -> Tally:
        """One tally of different texts that were summed up apart."""
        if len(parts) == 1:
            return parts[0]
        sequence = np.concatenate([part.sequence for part in parts])
        order = np.argsort(sequence, kind="stable")
        depths = max(part.reached.shape[1] for part in parts)
        reached = [np.pad(part.reached, ((0, 0), (0, depths - part.reached.shape[1]))) for part in parts]
        sums = {name: np.concatenate([part.sums[name] for part in parts])[order] for name in parts[0].sums}
        domain = np.concatenate([part.domain for part in parts])[order]
        return cls(sequence[order], domain, sums, np.concatenate(reached)[order], parts[0].domains)

    @property
    def coverage(self) -> float:
        """Share of all cycles that found every expansion they wanted."""
        return float(self.sums["covered"].sum() / self.sums["cycles"].sum())

    @property
    def figures(self) -> list[str]:
        """Names of the figures that can be computed."""
        return [name for name, (above, below) in FIGURES.items() if above in self.sums and below in self.sums]

    def present(self) -> list[int]:
        """Domains with a text, by index."""
        return np.unique(self.domain).tolist()

    def by_domain(self, figure: str) -> dict[str, float]:
        """The figure of each domain with a text."""
        above, below = (self.sums[name] for name in RATIOS[figure])
        return {self.domains[d]: float(above[self.domain == d].sum() / below[self.domain == d].sum()) for d in self.present()}

    def mean(self, figure: str) -> float:
        """The mean over the domains."""
        values = self.by_domain(figure).values()
        return sum(values) / len(values)

    def to_json(self) -> dict[str, Any]:
        """Plain lists; :meth:`from_json` reads them back to the bit."""
        content = {"sequence": self.sequence.tolist(), "domain": self.domain.tolist(), "domains": self.domains}
        return content | {"sums": {name: v.tolist() for name, v in self.sums.items()}, "reached": self.reached.tolist()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Tally:
        sums = {name: np.array(values, dtype=np.float64) for name, values in content["sums"].items()}
        sequence = np.array(content["sequence"], dtype=np.int64)
        reached = np.array(content["reached"], dtype=np.float64).reshape(len(sequence), -1)
        return cls(sequence, np.array(content["domain"], dtype=np.int64), sums, reached, content["domains"])


def tally(
    recording: Recording,
    log: CycleLog,
    cycle_ms: Tensor | None = None,
    plain_ms: Tensor | None = None,
    step: Tensor | None = None,
) -> Tally:
    """Sum a replay up.

    :param cycle_ms: predicted float64 [C] milliseconds of each cycle.
    :param plain_ms: predicted float64 [S] milliseconds of plain decoding of each text of the recording, whole.
    :param step: int64 [C] the step that each cycle was part of (by default each was alone).
    """
    sequence, place = torch.unique_consecutive(log.sequence, return_inverse=True)
    count = len(sequence)

    def add(value: Tensor) -> np.ndarray:
        return torch.zeros(count, dtype=torch.float64).index_add_(0, place, value.double()).numpy()

    sums = {
        "cycles": add(torch.ones_like(log.kept)),
        "emitted": add(log.emitted),
        "kept": add(log.kept),
        "verified": add(log.kept + 1),
        "levels": add(log.levels),
        "covered": add(log.missing == 0),
        "accepted": add(log.accepted),
    }
    if cycle_ms is not None:
        rows = torch.ones_like(log.kept) if step is None else torch.bincount(step)[step]
        sums |= {"ms": add(cycle_ms), "machine_ms": add(cycle_ms / rows), "thousands": 1000.0 * sums["emitted"]}
    if plain_ms is not None:
        steps = (torch.from_numpy(recording.length[sequence.numpy()]) - 1).double().numpy()
        sums["plain_ms"] = plain_ms[sequence].numpy() / steps * sums["emitted"]
    depths = torch.arange(1, int(log.accepted.max()) + 1 if len(log.accepted) else 1)
    reached = torch.zeros((count, len(depths)), dtype=torch.float64)
    reached.index_add_(0, place, (log.accepted[:, None] >= depths).double())
    domain = recording.domain_index[sequence.numpy()]
    return Tally(sequence.numpy(), domain, sums, reached.numpy(), list(recording.domains))
