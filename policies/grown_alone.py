"""The only tree of a request that decodes alone on a CPU, as goodput sees it: what `policies.grown` decides, to the bit.

A level is some ten numbers mostly, and plain Python is done with them before a few of NumPy's operations have started.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left

import numpy as np
import torch
from torch import Tensor

from policies.acceptance_table import Acceptance, remember
from policies.contract import Cycle, Expansion, Outcome
from policies.lookahead import Plan
from policies.order import NONE
from policies.sums import UNIT
from policies.tree import DraftTree


class GrownAlone:
    """One tree, with the methods of :class:`policies.grown.Grown`. Of all levels so far:

    chance  P of the node in each slot, -1 in empty ones
    node    the node in each slot, -1 = empty
    first   every family's first choice: its node and its chance, given its parent
    """

    def __init__(self, acceptance: Acceptance, plan: Plan, history: Tensor, cycle: Cycle, fanout: int):
        self.chance: list[float] = []
        self.node: list[int] = []
        self.first: list[tuple[int, float]] = []
        self._acceptance, self._plan, self._fanout, self._history = acceptance, plan, fanout, history.item()
        self._cycle, self._place = cycle, plan.at_one(cycle.context_length.item())
        self._by_history = acceptance.by_one_history(self._history, fanout)
        self._looked, self._passed, self._parent = 0, -math.inf, [1.0]

    def wish(self, tree: DraftTree) -> Expansion | None:
        if tree.levels == 0:
            return Expansion(tree.frontier_of([0]), self._fanout) if self._opens() else None
        own, score = self._look(tree)
        slot = sorted(range(len(score)), key=score.__getitem__, reverse=True)[: self._fanout]  # equal ones keep their order
        chance = [own[place] if score[place] > self._passed else 0.0 * own[place] for place in slot]
        width = self._plan.width_alone(tree.levels, self._place, chance)
        if width == 0:
            return None
        if width < len(slot):
            self._passed = max(self._passed, score[slot[width]])
        self._parent = chance[:width]
        return Expansion(tree.frontier_of(slot[:width]), self._fanout)

    def _opens(self) -> bool:
        plan = self._plan
        if plan.always[self._place]:
            return True
        where = plan.root_edges.searchsorted(self._cycle.root_entropy.numpy())  # as among others, even of what is no number
        return bool(plan.opens[self._place, where[0]])

    def kept(self, tree: DraftTree, tokens: int) -> Tensor:
        if self._looked < tree.levels:
            self._look(tree)
        chance = array("f", self.chance).tolist()  # float32, where some are equal
        order = sorted(range(len(chance)), key=chance.__getitem__, reverse=True)[: tokens - 1]  # equal ones keep their order
        kept = np.zeros((1, tree.width), dtype=bool)
        for chosen in order[: self._plan.most_worth_alone(self._place, [chance[slot] for slot in order])]:
            kept[0, self.node[chosen]] = True  # an empty slot's -1 is the last node, which is likelier and marked already
        return torch.from_numpy(kept)

    def remembered(self, outcome: Outcome, active: Tensor) -> Tensor:
        status, tested, surprise = outcome.status[0].tolist(), 0, 0
        for node, expected in self.first if active.item() else ():
            if node >= 0 and status[node] >= 0:
                tested += 1
                surprise += round(UNIT * (status[node] - expected))
        return torch.from_numpy(np.array([remember(self._history, surprise / UNIT, tested)]))

    def _look(self, tree: DraftTree) -> tuple[list[float], list[float]]:
        """Estimate the chances of the newest level: P and score of the node in each slot."""
        newest, by_history = tree.newest_listed(), self._by_history
        node, fanout = newest.node, newest.fanout
        against, begins, columns, logprob_edges, entropy_edges = self._acceptance.of_one_level(tree.levels, fanout)
        given: list[float] = []
        for family, entropy in enumerate(newest.entropy):
            begin = begins[bisect_left(entropy_edges, entropy)]
            for rank, logprob in enumerate(newest.logprob[family * fanout : (family + 1) * fanout]):
                odds = against[bisect_left(logprob_edges, logprob) * columns + begin[rank]]
                given.append(1 / (odds * by_history[rank] + 1))
        chance = [own * self._parent[slot // fanout] if node[slot] >= 0 else NONE for slot, own in enumerate(given)]
        self.chance += chance
        self.node += node
        self.first += zip(node[::fanout], given[::fanout], strict=True)
        self._looked += 1
        return chance, newest.score
