"""What drafting on is worth: the accepted tokens that lie ahead of a node, once what verifies them has been paid.

Behind a node that the target takes, with chance P of getting there, lie nodes with chances P * R, where R is the product of the
conditional chances from it on. A token being worth ``value`` and verifying one more costing ``price``, each of them brings
max(0, value * P * R - price), for the likely ones are verified and the others are not. So what m further levels bring is

    value * P * f_m(price / (value * P)),     f_m(u) = E[sum of max(0, R - u) over the nodes of m levels behind an accepted node].

f_m knows no machine: it is measured on a recording once, and any prices may be put in. Levels are taken as independent,

    f_m(u) = E[sum over children of max(0, r - u) + r * f_(m-1)(u / r)],

r being the children's conditional chances (`policies.acceptance_table`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from policies.cost import Cost
from policies.errors import UserError
from policies.prices import CONTEXTS, Prices, prices_at

LEVELS = 8
"""How far ahead f_m looks: m = 1 .. LEVELS."""
GRID = (0.0, *(float(u) for u in np.geomspace(0.005, 1, 15).round(5)))
"""Points u of f_m, read between them linearly; f_m(1) = 0."""
TYPICAL = 8
"""Verified tokens over which the price of one more is averaged: real prices come in stairs."""
NARROW = 4
"""Width at which levels beyond the next are priced."""
LEAST = 1e-9
"""Prices and worths are taken as no less, ms: they are divided by."""


class LookAhead:
    """f_m as a function, from its values: ``table`` [LEVELS, len(GRID)]."""

    def __init__(self, table: tuple[tuple[float, ...], ...]):
        try:
            values = torch.tensor(table, dtype=torch.float64)
        except (TypeError, ValueError):
            values = torch.empty(0)
        if values.dim() != 2 or values.shape[1] != len(GRID) or not bool(values.isfinite().all()):
            raise UserError(f"a look-ahead must hold rows of {len(GRID)} numbers: write it with sim.fit")
        grid = torch.tensor(GRID, dtype=torch.float64)
        slope = values.diff(dim=1) / grid.diff()
        self.levels = len(values)
        start = values[:, :-1] - slope * grid[:-1]
        self._held = {torch.device("cpu"): (grid[1:-1].contiguous(), start.T.contiguous(), slope.T.contiguous())}

    def __call__(self, share: Tensor) -> Tensor:
        """f_m float64 [..., LEVELS] of ``share`` u float64 [...]; 0 from u = 1 on. Elementwise."""
        device = share.device
        if device not in self._held:
            self._held[device] = tuple(part.to(device) for part in self._held[torch.device("cpu")])
        inner, start, slope = self._held[device]
        share = share.clamp(max=1)
        place = torch.bucketize(share, inner)
        return (start[place] + slope[place] * share[..., None]).clamp_(min=0)

    def rate(self, prices: Prices) -> Tensor:
        """What a token costs, ms float64 [C], where prices are typical: at that value a cycle is worth just what it takes."""
        ahead = torch.arange(self.levels)
        next_one = prices.level[min(1, len(prices.level) - 1)]
        drafting = prices.level[0][:, 1:2] + ahead * next_one[:, _at(NARROW, next_one), None]
        price, low, high = price_of(prices), torch.zeros_like(prices.plain), prices.plain.clone()
        for _ in range(60):
            middle = (low + high) / 2
            gain = middle[:, None] * self(price / middle.clamp(min=LEAST)) - drafting
            enough = middle + gain.amax(1).clamp(min=0) > prices.plain
            low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
        return high


class Plan(NamedTuple):
    """Prices at C contexts as decisions ask for them, ms float64.

    context  int64 [C]
    rate     [C]              what a token costs
    price    [C]              what one more verified token costs
    verify   [C, V]           see :class:`policies.prices.Prices`
    level    [depth, C, W, M] a level of each width from 1, with 0 .. M - 1 further ones planned behind it
    """

    context: Tensor
    rate: Tensor
    price: Tensor
    verify: Tensor
    level: tuple[Tensor, ...]

    @classmethod
    def made(cls, prices: Prices, ahead: LookAhead, device: torch.device) -> Plan:
        further = torch.arange(ahead.levels)
        last = len(prices.level) - 1
        behind = [prices.level[min(level + 1, last)][:, 1:, None] * further for level in range(last + 1)]
        level = tuple((own[:, 1:, None] + more).to(device) for own, more in zip(prices.level, behind, strict=True))
        flat = (prices.context, ahead.rate(prices), price_of(prices), prices.verify)
        return cls(*(part.to(device) for part in flat), level)


@lru_cache(maxsize=64)
def plan_of(cost: Cost, ahead: LookAhead, depth: int, widest: int, tokens: int, device: torch.device) -> Plan:
    """The plan under a cost model, made once for each."""
    return Plan.made(prices_at(cost, torch.tensor(CONTEXTS), depth, widest, tokens), ahead, device)


def price_of(prices: Prices) -> Tensor:
    """What one more verified token costs, ms float64 [C]."""
    count = _at(TYPICAL, prices.verify)
    return (prices.verify[:, count] / max(count, 1)).clamp(min=LEAST)


def _at(place: int, table: Tensor) -> int:
    return min(place, table.shape[1] - 1)


def fit_look_ahead(chance: np.ndarray, nodes: Any, widest: int) -> tuple[tuple[float, ...], ...]:
    """f_m from the tested nodes (`sim.samples.Nodes`) and the ``chance`` float64 [n] of each, given its parent."""
    family = np.unique(nodes.sample * (int(nodes.depth.max()) + 1) + nodes.depth, return_inverse=True)[1]
    known = nodes.rank < widest
    child = np.zeros((family.max() + 1, widest))
    child[family[known], nodes.rank[known]] = chance[known]  # those of one accepted node are one family
    grid, table = np.array(GRID), [np.zeros(len(GRID))]
    for _ in range(LEVELS):
        behind = [child * np.interp(u / np.maximum(child, LEAST), grid, table[-1]) for u in grid]
        table.append(np.array([(np.maximum(child - u, 0) + more).sum(1).mean() for u, more in zip(grid, behind, strict=True)]))
    return tuple(tuple(float(value) for value in row.round(6)) for row in table[1:])
