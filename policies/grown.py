"""Growing trees as goodput sees them: each node's chance of lying on the target's path, level by level, on the host.

Levels lie here as they lie in the tree (`policies.families`): W families of K slots each. Among a row's nodes the order of
slots is the order of nodes, so that ties fall as in the total order.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from policies.acceptance_table import Acceptance
from policies.families import Families
from policies.order import NONE
from policies.tree import DraftTree


class Grown:
    """A batch of B trees. Per level so far:

    chance  float64 [B, W * K]  P of the node in each slot, -1 in empty ones
    node    int64   [B, W * K]  the node in each slot, -1 = empty
    first   float64 [B, W]      the chance of each family's first choice, given its parent
    """

    def __init__(self, acceptance: Acceptance, history: np.ndarray, fanout: int):
        """:param history: float64 [B], see `policies.acceptance_table`. :param fanout: the most children that a node gets."""
        rows = len(history)
        self.chance: list[np.ndarray] = []
        self.node: list[np.ndarray] = []
        self.first: list[np.ndarray] = []
        self._acceptance, self._by_history = acceptance, acceptance.by_history(history, fanout)
        self._row = np.arange(rows)[:, None]
        self._passed = np.full((rows, 1), -np.inf, dtype=np.float32)  # the best score that was passed over
        self._parent = np.ones((rows, 1))  # P of the nodes that were expanded last

    def frontier(self, tree: DraftTree, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The slots int64 [B, M] of the newest level's ``count`` best nodes, in total order, their scores float32 and their P
        float64; 0 for those than which a likelier node was passed over at an earlier level."""
        families = tree.newest_families()
        self._look(tree.levels, families)
        score = on_host(families.score)
        slot = (-score).argsort(1, kind="stable")[:, :count]
        score, chance = score[self._row, slot], self.chance[-1][self._row, slot]
        chance *= score > self._passed
        return slot, score, chance

    def expanded(self, score: np.ndarray, chance: np.ndarray, width: np.ndarray) -> None:
        """The first ``width`` int64 [B] of the frontier's nodes were expanded, the others passed over."""
        passed = np.concatenate([score, self._passed], 1)[self._row, width[:, None]]
        self._passed, self._parent = np.maximum(self._passed, passed), chance

    def look_at_all(self, tree: DraftTree) -> None:
        """Estimate the newest level's chances too, where drafting has ended with a level that no frontier was taken of."""
        if len(self.chance) < tree.levels:
            self._look(tree.levels, tree.newest_families())

    def _look(self, level: int, families: Families) -> None:
        own = self._acceptance.of_level(level, on_host(families.logprob), on_host(families.entropy), self._by_history)
        chance = (own * self._parent[:, : own.shape[1], None]).reshape(len(own), -1)
        if families.node is None:
            node = 0 * self._row + np.arange(families.first, families.first + chance.shape[1])
        else:
            node = on_host(families.node)
            chance[node < 0] = NONE
        self.chance.append(chance)
        self.node.append(node)
        self.first.append(own[:, :, 0])

    def likeliest(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The ``count`` likeliest nodes by P in float32, ties by node: int64 [B, M], -1 = none, and their P float64, then 0."""
        chance, node = np.concatenate(self.chance, 1).astype(np.float32), np.concatenate(self.node, 1)
        place = (-chance).argsort(1, kind="stable")[:, :count]
        return node[self._row, place], np.maximum(chance[self._row, place], 0).astype(np.float64)

    def first_choices(self) -> tuple[np.ndarray, np.ndarray]:
        """Every family's first choice: its node int64 [B, F], -1 = none, and its chance float64, given its parent."""
        node = [node[:, :: node.shape[1] // first.shape[1]] for node, first in zip(self.node, self.first, strict=True)]
        return np.concatenate(node, 1), np.concatenate(self.first, 1)

    def marked(self, node: np.ndarray, mark: np.ndarray, width: int) -> np.ndarray:
        """bool [B, width]: the ``node`` int64 [B, M] that are marked (bool [B, M])."""
        marked = np.zeros((len(node), width + 1), dtype=bool)
        marked[self._row, node] = mark  # the last column catches the -1
        return marked[:, :width]


def on_host(tensor: Tensor) -> np.ndarray:
    """The tensor's values; on a CPU its own memory."""
    return tensor.numpy(force=True)
