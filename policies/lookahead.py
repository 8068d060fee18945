"""What drafting on is worth: the accepted tokens that lie ahead of a node, once what verifies them has been paid.

Behind a node that the target takes, with chance P of getting there, lie nodes with chances P * R, where R is the product of the
conditional chances from it on. A token being worth ``value`` and verifying one more costing ``price``, each of them brings
max(0, value * P * R - price), for the likely ones are verified and the others are not. So what m further levels bring is

    value * P * f_m(price / (value * P)),     f_m(u) = E[sum of max(0, R - u) over the nodes of m levels behind an accepted node].

f_m knows no machine: it is measured on a recording once, and any prices may be put in. Levels are taken as independent,

    f_m(u) = E[sum over children of max(0, r - u) + r * f_(m-1)(u / r)],

r being the children's conditional chances (`policies.acceptance_table`).

At the root nothing has been drafted yet, so its children's chances are unknown. But how unsure the target was of the root itself is
known, and says whether the next tokens will be easy: where it samples from flat distributions, they are hard for any draft. So the
first level's mean is taken in bins of that entropy, and a cycle is decoded plainly where drafting does not pay in its bin.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from policies.cost import Cost
from policies.errors import UserError
from policies.prices import CONTEXTS, Prices, prices_at
from policies.sums import UNIT

LEVELS = 8
"""How far ahead f_m looks: m = 1 .. LEVELS."""
GRID = (0.0, *(float(u) for u in np.geomspace(0.005, 1, 15).round(5)))
"""Points u of f_m, read between them linearly; f_m(1) = 0."""
TYPICAL = 8
"""Verified tokens over which the price of one more is averaged: real prices come in stairs."""
NARROW = 4
"""Width at which levels beyond the next are priced."""
ROOTS = 8
"""Bins of the root's entropy, each as often seen as the others."""
WHOLE = 1.5 * 2.0**52
"""From here on float64 numbers lie 1 apart: to add it and to take it away again rounds, in NumPy as in plain Python."""
LEAST = 1e-9
"""Prices and worths are taken as no less, ms: they are divided by."""


class LookAhead:
    """f_m as a function, from its values: ``table`` [LEVELS, len(GRID)]. Between the points it is a straight line:
    ``start`` + ``slope`` * u, float64 [len(GRID) - 1, LEVELS] each."""

    def __init__(self, table: tuple[tuple[float, ...], ...]):
        try:
            values = np.array(table, dtype=np.float64)
        except (TypeError, ValueError):
            values = np.empty(0)
        if values.ndim != 2 or values.shape[1] != len(GRID) or not np.isfinite(values).all():
            raise UserError(f"a look-ahead must hold rows of {len(GRID)} numbers: write it with sim.fit")
        grid = np.array(GRID)
        slope = np.diff(values) / np.diff(grid)
        self.levels, self._inner = len(values), grid[1:-1]
        self.start, self.slope = (values[:, :-1] - slope * grid[:-1]).T.copy(), slope.T.copy()

    def __call__(self, share: np.ndarray) -> np.ndarray:
        """f_m float64 [..., LEVELS] of ``share`` u float64 [...]; 0 from u = 1 on. Elementwise."""
        share = share.clip(max=1)
        place = self._inner.searchsorted(share)
        return (self.start[place] + self.slope[place] * share[..., None]).clip(min=0)


class Opening:
    """f_m behind a root, in bins of the target's entropy there.

    edges  float32 [R - 1]  ascending edges between bins of that entropy (nats); x <= edge lies below
    ahead  one :class:`LookAhead` for each of the R bins, which are equally frequent
    """

    def __init__(self, edges: tuple[float, ...], tables: tuple[tuple[tuple[float, ...], ...], ...]):
        try:
            self.edges, self.ahead = np.array(edges, dtype=np.float32), [LookAhead(table) for table in tables]
        except (TypeError, ValueError):
            self.edges, self.ahead = np.empty(0, dtype=np.float32), []
        fits = self.edges.ndim == 1 and len(self.ahead) == len(self.edges) + 1 and bool((np.diff(self.edges) > 0).all())
        if not fits or len({ahead.levels for ahead in self.ahead}) > 1:
            raise UserError(
                "a look-ahead must hold ascending edges between bins of the root's entropy, and a table for each bin, all of "
                "as many levels: write it with sim.fit"
            )

    def gain(self, prices: Prices, value: np.ndarray, patience: float = 1.0) -> np.ndarray:
        """What drafting brings, ms float64 [C, R]: the best number of levels' worth less their time, which may be negative.

        :param value: float64 [C], ms that a token is worth.
        """
        price, level = price_of(prices), [level.numpy() for level in prices.level]
        next_one = level[min(1, len(level) - 1)]
        taken = level[0][:, 1:2] + np.arange(self.ahead[0].levels) * next_one[:, _at(NARROW, next_one), None]
        share = price / value.clip(min=LEAST)
        return np.stack([(patience * value[:, None] * ahead(share) - taken).max(1) for ahead in self.ahead], 1)

    def rate(self, prices: Prices) -> np.ndarray:
        """What a token costs, ms float64 [C], where prices are typical: at that value a cycle is worth just what it takes, if it
        drafts where that pays."""
        plain = prices.plain.numpy()
        low, high = np.zeros_like(plain), plain.copy()
        for _ in range(60):
            middle = (low + high) / 2
            enough = middle + self.gain(prices, middle).clip(min=0).mean(1) > plain
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        return high


STEEP = np.array([1 / u for u in GRID[:0:-1]])
"""The points of f_m as P * value / price = 1 / u, ascending: no division is needed to find the line that holds."""
_STEEP = STEEP.tolist()


class Plan:
    """Which frontiers are worth a level, at C contexts: prices, values and f_m in the form in which decisions ask for them.

    With f_m(u) = start + slope * u in a bin of u, ``patience`` * value * P * f_m(price / (value * P)) is a straight line in P:
    all that is left to do for a node is to find its bin. Milliseconds are counted in whole multiples of ``1 / UNIT``, whose
    sums are exact.

    value   float64 [C]     ms that a token is worth
    verify  float64 [C, V]  ms of n further verified tokens
    opens   bool [C, R]     whether drafting is worth it at all, by bin of the root's entropy
    always  bool [C]        whether it is in every bin
    """

    def __init__(self, prices: Prices, ahead: LookAhead, opening: Opening, markup: float, patience: float):
        self._context, self.verify, price = prices.context.numpy(), prices.verify.numpy(), price_of(prices)
        self.value = markup * opening.rate(prices)
        self._steep = self.value / price
        flat = np.maximum(ahead.start[-1:] + ahead.slope[-1:], 0)  # from u = 1 on
        start, slope = np.concatenate([flat, ahead.start[::-1]]), np.concatenate([0 * flat, ahead.slope[::-1]])
        by_chance, fixed = self.value[:, None, None] * start, price[:, None, None] * slope
        lines = patience * UNIT * np.stack([by_chance, fixed], 2)  # [C, bins, 2, LEVELS]
        self._bins, self._lines, self._ahead = len(start), lines.reshape(-1, 2, ahead.levels), ahead.levels
        level, further = [level.numpy() for level in prices.level], np.arange(ahead.levels)
        behind = [level[min(place + 1, len(level) - 1)][:, 1:, None] * further for place in range(len(level))]
        self._level = [np.rint(UNIT * (own[:, 1:, None] + more)) for own, more in zip(level, behind, strict=True)]
        self._contexts: list[int] = self._context.tolist()
        self._frontier: dict[tuple[int, int], tuple[list, list]] = {}  # what decisions on a single row read, as lists
        self._verifying: dict[int, tuple[float, list[float]]] = {}
        self.root_edges = opening.edges
        self.opens = opening.gain(prices, self.value, patience) > 0
        self.always = self.opens.all(1)

    def at(self, context: np.ndarray) -> np.ndarray:
        """Which of the C contexts int64 [B] holds behind so many tokens int64 [B]."""
        return self._context.searchsorted(context, side="right") - 1

    def at_one(self, context: int) -> int:
        """:meth:`at` of a single row."""
        return bisect_right(self._contexts, context) - 1

    def width(self, level: int, place: np.ndarray, chance: np.ndarray) -> np.ndarray:
        """How many of a frontier's nodes are worth a level: int64 [B], 0 = none; the fewest of equally good ones.

        :param level: how many levels there are. :param place: int64 [B], see :meth:`at`. :param chance: float64 [B, M], P of each.
        """
        line = STEEP.searchsorted(chance * self._steep[place, None])
        line += place[:, None] * self._bins
        lines = self._lines.take(line, 0)
        gain = chance[:, :, None] * lines[:, :, 0]
        gain += lines[:, :, 1]
        gain += WHOLE
        gain -= WHOLE
        gain = gain.cumsum(1)
        gain -= self._level[level][place, : chance.shape[1]]
        gain = gain.reshape(len(gain), -1)
        first = gain.argmax(1)
        return (first // self._ahead + 1) * (gain[np.arange(len(gain)), first] > 0)

    def width_alone(self, level: int, place: int, chance: list[float]) -> int:
        """:meth:`width` of a single row, to the bit. Between two forward passes all code is cold, so that a loop of a few lines
        takes less than a dozen array operations, each of which comes from memory."""
        if (level, place) not in self._frontier:
            lines = self._lines[place * self._bins : (place + 1) * self._bins]
            self._frontier[level, place] = lines.tolist(), self._level[level][place].tolist()
        lines, taken = self._frontier[level, place]
        steep, gain, most, width = float(self._steep[place]), [0.0] * self._ahead, 0.0, 0
        for count, (own, prices) in enumerate(zip(chance, taken, strict=False), 1):
            by_chance, fixed = lines[bisect_left(_STEEP, own * steep)]
            for more, price in enumerate(prices):
                so_far = gain[more] = gain[more] + (own * by_chance[more] + fixed[more] + WHOLE - WHOLE)
                if so_far - price > most:
                    most, width = so_far - price, count
        return width

    def most_worth(self, place: np.ndarray, chance: np.ndarray) -> np.ndarray:
        """How many of a tree's likeliest nodes are worth verifying: the n int64 [B] that maximises the value of the first n chances
        float64 [B, M] (each at most 1; those below 0 count as 0) less the ms of n more tokens, the least of equal ones."""
        gain = -self.verify[place, : chance.shape[1] + 1]
        gain[:, 1:] += (UNIT * chance.clip(min=0) + WHOLE - WHOLE).cumsum(1) * (self.value[place] / UNIT)[:, None]
        return gain.argmax(1)

    def most_worth_alone(self, place: int, chance: list[float]) -> int:
        """:meth:`most_worth` of a single row, to the bit."""
        if place not in self._verifying:
            self._verifying[place] = float(self.value[place] / UNIT), self.verify[place].tolist()
        value, ms = self._verifying[place]
        most, worth, total = -ms[0], 0, 0.0
        for count, own in enumerate(chance, 1):
            total += UNIT * max(own, 0.0) + WHOLE - WHOLE
            if (gain := total * value - ms[count]) > most:
                most, worth = gain, count
        return worth


@lru_cache(maxsize=64)
def plan_of(
    cost: Cost, ahead: LookAhead, opening: Opening, markup: float, patience: float, depth: int, widest: int, tokens: int
) -> Plan:
    """The plan under a cost model, made once for each."""
    return Plan(prices_at(cost, torch.tensor(CONTEXTS), depth, widest, tokens), ahead, opening, markup, patience)


def price_of(prices: Prices) -> np.ndarray:
    """What one more verified token costs, ms float64 [C]."""
    count = _at(TYPICAL, prices.verify)
    return (prices.verify[:, count] / max(count, 1)).clamp(min=LEAST).numpy()


def _at(place: int, table: Any) -> int:
    return min(place, table.shape[1] - 1)


def fit_look_ahead(chance: np.ndarray, nodes: Any, widest: int) -> tuple[tuple[float, ...], ...]:
    """f_m from the tested nodes (`sim.samples.Nodes`) and the ``chance`` float64 [n] of each, given its parent."""
    child, table = _families(chance, nodes, widest)[0], [np.zeros(len(GRID))]
    for _ in range(LEVELS):
        table.append(_one_more(child, table[-1]))
    return _as_tuples(table[1:])


def fit_opening(
    chance: np.ndarray, nodes: Any, widest: int, ahead: tuple[tuple[float, ...], ...], entropy: np.ndarray
) -> tuple[tuple[float, ...], tuple[tuple[tuple[float, ...], ...], ...]]:
    """The edges and the tables of an :class:`Opening`; ``entropy`` float32 [P]: the target's at each position's root."""
    child, sample, depth = _families(chance, nodes, widest)
    child, told = child[depth == 1], entropy[sample[depth == 1]]
    edges = np.unique(np.quantile(told, np.linspace(0, 1, ROOTS + 1)[1:-1], method="lower"))
    edges = edges[edges < told.max()]  # each bin holds a root
    bin_of, behind = edges.searchsorted(told), [np.zeros(len(GRID)), *map(np.array, ahead)]
    of_root = [child[bin_of == own] for own in range(len(edges) + 1)]
    tables = tuple(_as_tuples([_one_more(own, rest) for rest in behind[:LEVELS]]) for own in of_root)
    return tuple(edges.astype(np.float64).tolist()), tables


def _families(chance: np.ndarray, nodes: Any, widest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The chances float64 [F, widest] of the children of each accepted node, its position int64 [F] and their depth."""
    family, first, index = np.unique(
        nodes.sample * (int(nodes.depth.max()) + 1) + nodes.depth, return_index=True, return_inverse=True
    )
    known, child = nodes.rank < widest, np.zeros((len(family), widest))
    child[index[known], nodes.rank[known]] = chance[known]  # those of one accepted node are one family
    return child, nodes.sample[first], nodes.depth[first]


def _one_more(child: np.ndarray, behind: np.ndarray) -> np.ndarray:
    """f_m float64 [len(GRID)] of families with these chances [F, K], from f_(m - 1) behind their nodes."""
    grid = np.array(GRID)
    further = [child * np.interp(u / np.maximum(child, LEAST), grid, behind) for u in grid]
    return np.array([(np.maximum(child - u, 0) + more).sum(1).mean() for u, more in zip(grid, further, strict=True)])


def _as_tuples(table: list[np.ndarray]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(value) for value in row.round(6)) for row in table)
