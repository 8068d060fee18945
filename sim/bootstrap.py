"""How sure a figure is: the paired bootstrap over texts (Efron 1979; percentile intervals).

Texts are the independent units, cycles within a text are not; so texts are drawn with replacement, within each domain (the
domains are fixed, and count equally). Every policy sees the same draws: a difference between two policies is taken draw by
draw, and what makes texts easy or hard for all of them cancels out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from policies.errors import UserError
from sim.tally import RATIOS, Tally

COVER = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95% interval; low and high are None where a domain holds too few texts (fewer than two)."""

    value: float
    low: float | None = None
    high: float | None = None

    def overlaps(self, other: Estimate) -> bool:
        """Whether the intervals have a value in common; those of no width are their values."""
        low, high = (self.value, self.value) if self.low is None else (self.low, self.high)
        other_low, other_high = (other.value, other.value) if other.low is None else (other.low, other.high)
        return low <= other_high and other_low <= high


@dataclass(frozen=True)
class Difference:
    """Figure of one policy less that of another.

    share  of the draws in which the difference is above 0 (ties count half); None where there is no interval
    """

    estimate: Estimate
    share: float | None


class Resamples:
    """Draws of texts: one set for all policies that were replayed on the same texts."""

    def __init__(self, like: Tally, count: int = RESAMPLES, seed: int = 0):
        """:param like: any tally of those texts.   :param count: draws.   :raises UserError: for fewer than 100 draws."""
        if count < 100:
            raise UserError(f"--resamples must be 100 or more for a 95% interval, not {count}")
        self.sequence, self.domain, self.count, self.seed = like.sequence, like.domain, count, seed

    @cached_property
    def _times_drawn(self) -> dict[int, np.ndarray]:
        """Per domain float64 [R, n]: how often each of its texts was drawn."""
        drawn = {}
        for domain in np.unique(self.domain).tolist():
            size = int((self.domain == domain).sum())
            generator = np.random.Generator(np.random.Philox(key=[self.seed, domain]))
            drawn[domain] = generator.multinomial(size, np.full(size, 1 / size), size=self.count).astype(np.float64)
        return drawn

    def draws(self, sums: Tally, figure: str, domain: int | None = None) -> np.ndarray | None:
        """The figure in every draw, float64 [R]: of a domain, or the mean over them. None where a domain has one text."""
        if not np.array_equal(sums.sequence, self.sequence):
            raise ValueError("the tally is of other texts than the draws")
        above, below = (sums.sums[name] for name in RATIOS[figure])
        ratios = []
        for one in [domain] if domain is not None else np.unique(self.domain).tolist():
            mine = self.domain == one
            if mine.sum() < 2:
                return None
            ratios.append((self._times_drawn[one] @ above[mine]) / (self._times_drawn[one] @ below[mine]))
        return np.mean(ratios, axis=0)

    def estimate(self, sums: Tally, figure: str, domain: int | None = None) -> Estimate:
        """The figure with its interval, of a domain or of all."""
        value = sums.mean(figure) if domain is None else sums.by_domain(figure)[sums.domains[domain]]
        return Estimate(value, *interval(self.draws(sums, figure, domain)))

    def difference(self, one: Tally, other: Tally, figure: str, domain: int | None = None) -> Difference:
        """``one`` less ``other``, paired."""
        values = [self.estimate(tally, figure, domain).value for tally in (one, other)]
        draws = [self.draws(tally, figure, domain) for tally in (one, other)]
        if draws[0] is None:
            return Difference(Estimate(values[0] - values[1]), None)
        apart = draws[0] - draws[1]
        share = float((apart > 0).mean() + (apart == 0).mean() / 2)
        return Difference(Estimate(values[0] - values[1], *interval(apart)), share)

    def saving(self, one: Tally, other: Tally, figure: str) -> Estimate:
        """How much less of the figure ``one`` has than ``other``, as a share of the other's; of the means over domains, paired."""
        draws = [self.draws(tally, figure) for tally in (one, other)]
        share = None if draws[0] is None else 1 - draws[0] / draws[1]
        return Estimate(1 - one.mean(figure) / other.mean(figure), *interval(share))


def interval(draws: np.ndarray | None) -> tuple[float | None, float | None]:
    """The percentile interval that covers 95% of the draws."""
    if draws is None:
        return None, None
    low, high = np.quantile(draws, [(1 - COVER) / 2, (1 + COVER) / 2])
    return float(low), float(high)
