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
REMEMBERED = 4
"""Tallies about which a set of draws remembers what was asked last: some 2 MB each."""


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
        self._recent: list[_Drawn] = []

    @cached_property
    def texts_of(self) -> dict[int, np.ndarray]:
        """Per domain bool [n]: which texts are its own."""
        return {domain: self.domain == domain for domain in np.unique(self.domain).tolist()}

    @cached_property
    def times_drawn(self) -> dict[int, np.ndarray]:
        """Per domain float64 [R, n]: how often each of its texts was drawn."""
        drawn = {}
        for domain, mine in self.texts_of.items():
            size = int(mine.sum())
            generator = np.random.Generator(np.random.Philox(key=[self.seed, domain]))
            drawn[domain] = generator.multinomial(size, np.full(size, 1 / size), size=self.count).astype(np.float64)
        return drawn

    def draws(self, sums: Tally, figure: str, domain: int | None = None) -> np.ndarray | None:
        """The figure in every draw, float64 [R]: of a domain, or the mean over them. None where a domain has one text."""
        return self._drawn(sums).draws(figure, domain)

    def value(self, sums: Tally, figure: str, domain: int | None = None) -> float:
        """The figure without its interval, of a domain or of all."""
        return self._drawn(sums).value(figure, domain)

    def estimate(self, sums: Tally, figure: str, domain: int | None = None) -> Estimate:
        """The figure with its interval, of a domain or of all."""
        drawn = self._drawn(sums)
        return Estimate(drawn.value(figure, domain), *interval(drawn.draws(figure, domain)))

    def difference(self, one: Tally, other: Tally, figure: str, domain: int | None = None) -> Difference:
        """``one`` less ``other``, paired."""
        both = [self._drawn(tally) for tally in (one, other)]
        values = [drawn.value(figure, domain) for drawn in both]
        draws = [drawn.draws(figure, domain) for drawn in both]
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

    def _drawn(self, sums: Tally) -> _Drawn:
        """What was worked out about a tally; it is remembered while few others are asked about."""
        found = next((one for one in self._recent if one.sums is sums), None) or _Drawn(self, sums)
        self._recent = [found, *(one for one in self._recent if one is not found)][:REMEMBERED]
        return found


class _Drawn:
    """One tally in every draw. Figures share their sums, and the mean the domains' figures: each is worked out once."""

    def __init__(self, resamples: Resamples, sums: Tally):
        if not np.array_equal(sums.sequence, resamples.sequence):
            raise ValueError("the tally is of other texts than the draws")
        self.resamples, self.sums = resamples, sums
        self._values: dict[str, dict[str, float]] = {}
        self._sums: dict[tuple[str, int], np.ndarray] = {}
        self._draws: dict[tuple[str, int | None], np.ndarray | None] = {}

    def value(self, figure: str, domain: int | None) -> float:
        """The figure itself, of a domain or the mean over them."""
        if figure not in self._values:
            self._values[figure] = self.sums.by_domain(figure)
        values = self._values[figure]
        return sum(values.values()) / len(values) if domain is None else values[self.sums.domains[domain]]

    def draws(self, figure: str, domain: int | None) -> np.ndarray | None:
        """:meth:`Resamples.draws`."""
        if (figure, domain) not in self._draws:
            self._draws[figure, domain] = self._mean(figure) if domain is None else self._ratio(figure, domain)
        return self._draws[figure, domain]

    def _mean(self, figure: str) -> np.ndarray | None:
        ratios = [self.draws(figure, domain) for domain in self.resamples.texts_of]
        return None if any(ratio is None for ratio in ratios) else np.mean(ratios, axis=0)

    def _ratio(self, figure: str, domain: int) -> np.ndarray | None:
        if self.resamples.texts_of[domain].sum() < 2:
            return None
        above, below = (self._sum(name, domain) for name in RATIOS[figure])
        return above / below

    def _sum(self, name: str, domain: int) -> np.ndarray:
        """A sum over the domain's texts in every draw, float64 [R]."""
        if (name, domain) not in self._sums:
            mine = self.resamples.texts_of[domain]
            self._sums[name, domain] = self.resamples.times_drawn[domain] @ self.sums.sums[name][mine]
        return self._sums[name, domain]


def interval(draws: np.ndarray | None) -> tuple[float | None, float | None]:
    """The percentile interval that covers 95% of the draws."""
    if draws is None:
        return None, None
    low, high = np.quantile(draws, [(1 - COVER) / 2, (1 + COVER) / 2])
    return float(low), float(high)
