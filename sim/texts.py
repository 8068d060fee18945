"""Figures per text, and what they say over all: ratios of sums per domain, then the mean over domains.

Texts are the independent units of a comparison: two policies that decoded the same texts are compared text by text, and how
sure a difference is comes from drawing texts again (paired bootstrap within each domain, Efron 1979).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from policies.cost import Cost
from sim.pricing import price
from sim.replay import CycleLog

DRAWS = 2000


@dataclass(frozen=True)
class TextSums:
    """Sums over the cycles of each text, float64 [S] for all texts of the recording; 0 where a text was not decoded.

    emitted   tokens that count
    cycles    target calls
    verified  tokens that the target saw: kept nodes and roots
    levels    draft forwards, catch-ups among them
    missing   expansions that the recording lacks
    ms        predicted time; NaN without a cost model
    """

    emitted: np.ndarray
    cycles: np.ndarray
    verified: np.ndarray
    levels: np.ndarray
    missing: np.ndarray
    ms: np.ndarray


def text_sums(log: CycleLog, texts: int, cost: Cost | None = None) -> TextSums:
    """Sum a replay's cycles per text, for a recording of ``texts`` texts."""

    def total(value: Tensor) -> np.ndarray:
        return torch.zeros(texts, dtype=torch.float64).index_add(0, log.sequence, value.double()).numpy()

    return TextSums(
        emitted=total(log.emitted),
        cycles=total(torch.ones_like(log.emitted)),
        verified=total(log.kept + 1),
        levels=total(log.levels),
        missing=total(log.missing),
        ms=np.full(texts, np.nan) if cost is None else total(price(log, cost)),
    )


def by_domain(above: np.ndarray, below: np.ndarray, domain: np.ndarray) -> dict[int, float]:
    """Ratio of sums per domain index (int64 [S]), for float64 [S]; domains without a text to divide by are left out."""
    sums = {int(index): (above[domain == index].sum(), below[domain == index].sum()) for index in np.unique(domain)}
    return {index: float(upper / lower) for index, (upper, lower) in sums.items() if lower}


def over_domains(above: np.ndarray, below: np.ndarray, domain: np.ndarray) -> float:
    """The mean over domains of :func:`by_domain`; NaN when there is none."""
    ratios = list(by_domain(above, below, domain).values())
    return sum(ratios) / len(ratios) if ratios else float("nan")


def paired_interval(
    ours: np.ndarray, theirs: np.ndarray, emitted: np.ndarray, domain: np.ndarray, seed: int = 0
) -> tuple[float, float]:
    """95% interval of how much less time per token ``ours`` takes than ``theirs``, as a share of theirs.

    :param ours: ms float64 [S] of each text; ``theirs`` those of the same texts, ``emitted`` their tokens (0 = left out).
    """
    numbers = np.random.default_rng(seed)
    a, b = np.zeros(DRAWS), np.zeros(DRAWS)
    for index in np.unique(domain[emitted > 0]):
        members = np.flatnonzero((domain == index) & (emitted > 0))
        drawn = members[numbers.integers(0, len(members), (DRAWS, len(members)))]
        tokens = emitted[drawn].sum(1)
        a, b = a + ours[drawn].sum(1) / tokens, b + theirs[drawn].sum(1) / tokens
    low, high = np.quantile(1 - a / b, [0.025, 0.975])
    return float(low), float(high)
