"""Growing trees as goodput sees them: each node's chance of lying on the target's path, level by level, and what that is worth.

Levels lie here as they lie in the tree (`policies.families`): W families of K slots each. Among a row's nodes the order of
slots is the order of nodes, so that ties fall as in the total order. On the host: deciding consists of small operations.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from policies.acceptance_table import Acceptance, remember
from policies.contract import Cycle, Expansion, Outcome
from policies.lookahead import Plan
from policies.order import NONE
from policies.sums import UNIT
from policies.tree import DraftTree


class Grown:
    """A batch of B trees. Per level so far:

    chance  float64 [B, W * K]  P of the node in each slot, -1 in empty ones
    node    int64   [B, W * K]  the node in each slot, -1 = empty
    first   float64 [B, W]      the chance of each family's first choice, given its parent
    """

    def __init__(self, acceptance: Acceptance, plan: Plan, history: Tensor, cycle: Cycle, fanout: int):
        """:param history: float64 [B], see `policies.acceptance_table`.
        :param fanout: the most children that a node gets, and the widest frontier."""
        rows = len(history)
        self.chance: list[np.ndarray] = []
        self.node: list[np.ndarray] = []
        self.first: list[np.ndarray] = []
        self._acceptance, self._plan, self._fanout, self._history = acceptance, plan, fanout, on_host(history)
        self._cycle, self._place = cycle, plan.at(on_host(cycle.context_length))
        self._by_history = acceptance.by_history(self._history, fanout)
        self._row = np.arange(rows)[:, None]
        self._passed = np.full((rows, 1), -np.inf, dtype=np.float32)  # the best score that was passed over
        self._parent = np.ones((rows, 1))  # P of the nodes that were expanded last

    def wish(self, tree: DraftTree) -> Expansion | None:
        """The nodes that are worth another level; None where there is none in any row."""
        if tree.levels == 0:
            slot = np.where(self._opens(), 0, NONE)[:, None]
            most = slot.max() + 1
        else:
            slot, score, chance = self._frontier(tree)
            width = self._plan.width(tree.levels, self._place, chance)
            most = width.max()
            self._pass_over(score, chance, width)
            slot = np.where(np.arange(most) < width[:, None], slot[:, :most], NONE)
        if most == 0:
            return None
        return Expansion(tree.frontier_in(torch.from_numpy(slot).to(tree.device)), self._fanout)

    def _opens(self) -> np.ndarray:
        """bool [B]: whether drafting is worth it. What gave the roots is asked for only where it matters."""
        plan = self._plan
        if plan.always[self._place].all():
            return plan.always[self._place]
        return plan.opens[self._place, plan.root_edges.searchsorted(on_host(self._cycle.root_entropy))]

    def kept(self, tree: DraftTree, tokens: int) -> Tensor:
        """The nodes that are worth verifying, bool [B, N], of at most ``tokens`` with the root."""
        if len(self.chance) < tree.levels:  # drafting has ended with a level that no frontier was taken of
            self._look(tree)
        node, chance = self._likeliest(tokens - 1)
        count = self._plan.most_worth(self._place, chance)
        marked = np.zeros((len(node), tree.width + 1), dtype=bool)
        marked[self._row, node] = np.arange(node.shape[1]) < count[:, None]  # the last column catches the -1
        return torch.from_numpy(marked[:, : tree.width]).to(tree.device)

    def remembered(self, outcome: Outcome, active: Tensor) -> Tensor:
        """The history float64 [B] behind the cycle, from the first choices that were tested in ``active`` rows bool [B]."""
        node, expected = self._first_choices()
        status = on_host(outcome.status)[self._row, node]
        tested = (status >= 0) & (node >= 0) & on_host(active)[:, None]
        surprise = np.rint(UNIT * tested * (status - expected)).sum(1) / UNIT  # whole numbers: any order of adding is exact
        return torch.from_numpy(remember(self._history, surprise, tested.sum(1))).to(active.device)

    def _frontier(self, tree: DraftTree) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The slots int64 [B, M] of the newest level's best nodes, in total order, their scores float32 and their P float64; 0 for
        those than which a likelier node was passed over at an earlier level."""
        score = self._look(tree)
        slot = (-score).argsort(1, kind="stable")[:, : self._fanout]
        score, chance = score[self._row, slot], self.chance[-1][self._row, slot]
        chance *= score > self._passed
        return slot, score, chance

    def _pass_over(self, score: np.ndarray, chance: np.ndarray, width: np.ndarray) -> None:
        """The first ``width`` int64 [B] of the frontier's nodes are expanded, the others passed over."""
        passed = np.concatenate([score, self._passed], 1)[self._row, width[:, None]]
        self._passed, self._parent = np.maximum(self._passed, passed), chance

    def _look(self, tree: DraftTree) -> np.ndarray:
        """Estimate the newest level's chances; its scores float32 [B, W * K]."""
        families = tree.newest_families()
        own = self._acceptance.of_level(tree.levels, on_host(families.logprob), on_host(families.entropy), self._by_history)
        chance = (own * self._parent[:, : own.shape[1], None]).reshape(len(own), -1)
        if families.node is None:
            node = 0 * self._row + np.arange(families.first, families.first + chance.shape[1])
        else:
            node = on_host(families.node)
            chance[node < 0] = NONE
        self.chance.append(chance)
        self.node.append(node)
        self.first.append(own[:, :, 0])
        return on_host(families.score)

    def _likeliest(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The ``count`` likeliest nodes by P in float32, ties by node: int64 [B, M], -1 = none, and their P float64, then -1."""
        chance, node = np.concatenate(self.chance, 1).astype(np.float32), np.concatenate(self.node, 1)
        place = (-chance).argsort(1, kind="stable")[:, :count]
        return node[self._row, place], chance[self._row, place].astype(np.float64)

    def _first_choices(self) -> tuple[np.ndarray, np.ndarray]:
        """Every family's first choice: its node int64 [B, F], -1 = none, and its chance float64, given its parent."""
        node = [node[:, :: node.shape[1] // first.shape[1]] for node, first in zip(self.node, self.first, strict=True)]
        return np.concatenate(node, 1), np.concatenate(self.first, 1)


def on_host(tensor: Tensor) -> np.ndarray:
    """The tensor's values; on a CPU its own memory."""
    return tensor.numpy(force=True)
