"""A fixed tree of child ranks, the same at every position.

EAGLE-1 (Li et al. 2024, https://arxiv.org/abs/2401.15077) and Medusa (Cai et al. 2024,
https://arxiv.org/abs/2401.10774) verify such trees; the shapes below are the published ones, written as the number of
children of each inner node.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from policies.contract import Cycle, Expansion, Policy, State, require
from policies.order import NONE, best
from policies.registry import policy
from policies.tree import DraftTree

Path = tuple[int, ...]
MOST_CHILDREN = 1024  # a larger rank is a typing error, and would ask the drafter for as many children


def _from_fanout(fanout: dict[Path, int]) -> tuple[Path, ...]:
    return tuple(parent + (rank,) for parent, count in fanout.items() for rank in range(count))


PUBLISHED: dict[str, tuple[Path, ...]] = {
    "eagle1": _from_fanout(
        {(): 4, (0,): 3, (1,): 2, (2,): 2, (3,): 1, (0, 0): 3, (0, 1): 2, (0, 2): 2, (1, 0): 1}
        | {(0, 0, 0): 3, (0, 0, 0, 0): 2}
    ),
    "medusa": _from_fanout(
        {(): 10, (0,): 10, (1,): 7, (2,): 3, (3,): 2, **{(rank,): 1 for rank in range(4, 10)}}
        | {(0, 0): 10, (0, 1): 3, (0, 2): 2, **{(0, rank): 1 for rank in range(3, 8)}}
        | {(1, 0): 2, (2, 0): 1, (0, 0, 0): 2}
    ),
}


@policy("static", paper="https://arxiv.org/abs/2401.15077")
class Static(Policy):
    """A fixed tree: "eagle1" (25 nodes), "medusa" (63 nodes), or a list of paths of child ranks: ((0,), (0, 0), (1,)).

    A node of the tree is the rank-r child of its parent, whatever its token or probability.
    """

    tree: str | tuple = "eagle1"

    def __post_init__(self):
        if isinstance(self.tree, str):
            message = f"tree must be {' or '.join(PUBLISHED)} or a list of paths, not '{self.tree}'"
            require(self.tree in PUBLISHED, self.name, message)
            return
        well_formed = all(
            isinstance(path, tuple) and path and all(isinstance(r, int) and 0 <= r < MOST_CHILDREN for r in path)
            for path in self.tree
        )
        message = f"tree must be a list of non-empty paths of child ranks below {MOST_CHILDREN}, such as ((0,), (0, 0))"
        require(well_formed and bool(self.tree), self.name, message)
        paths = set(self.tree)
        orphan = next((path for path in paths if path[:-1] and path[:-1] not in paths), None)
        require(orphan is None, self.name, f"path {orphan} of tree has no parent {orphan and orphan[:-1]} in it")

    @cached_property
    def _layout(self) -> tuple[Tensor, Tensor, list[int], bool]:
        """(child place int64 [n+2, K], -1 = none; fanout int64 [n+2]; inner nodes per level; whether siblings' ranks have no
        gaps). Place 0 is the root, the last place none at all: -1."""
        given = PUBLISHED[self.tree] if isinstance(self.tree, str) else set(self.tree)
        paths: list[Path] = [()] + sorted(given, key=len)
        place = {path: index for index, path in enumerate(paths)}
        child = torch.full((len(paths) + 1, max(path[-1] for path in paths[1:]) + 1), NONE)
        for path in paths[1:]:
            child[place[path[:-1]], path[-1]] = place[path]
        fanout = torch.zeros(len(paths) + 1, dtype=torch.int64)
        for path in paths[1:]:
            fanout[place[path[:-1]]] = max(int(fanout[place[path[:-1]]]), path[-1] + 1)
        inner = [0] * (len(paths[-1]) + 1)
        for path in paths:
            inner[len(path)] += int(fanout[place[path]] > 0)
        return child, fanout, inner, int(fanout.sum()) == len(paths) - 1

    def begin(self, cycle: Cycle, state: State) -> State:
        """``place`` int64 [B, W]: where in the fixed tree the nodes stand that were expanded last, -1 = none."""
        return {"place": torch.zeros((cycle.active.shape[0], 1), dtype=torch.int64, device=cycle.active.device)}

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        child, fanout, inner, _ = self._layout
        if inner[tree.levels] == 0:
            return None
        if tree.levels == 0:
            return Expansion(tree.root_nodes(), int(fanout[0]))
        child, fanout, score = child.to(tree.device), fanout.to(tree.device), tree.newest_scores()
        place = child[state["place"], : score.shape[2]]
        slot = best(score.masked_fill(fanout[place] == 0, -torch.inf).flatten(1), inner[tree.levels])
        state["place"] = place.flatten(1).gather(1, slot.clamp(min=0)).masked_fill(slot < 0, NONE)
        return Expansion(tree.frontier_in(slot), fanout[state["place"]])

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        """All that was drafted, but for children that are there only for the sake of a later sibling."""
        child, _, _, no_gaps = self._layout
        state["place"] = state["place"][:, :0]  # its width is the deepest row's: emptied, it tells a row nothing of others
        if no_gaps:
            return tree.exists
        place = torch.zeros_like(tree.depth)
        for level in range(1, tree.levels + 1):  # parents' places are known one level earlier
            found = child.to(tree.device)[place.gather(1, tree.parent.clamp(min=0)), tree.rank.clamp(min=0)]
            place = torch.where(tree.depth == level, found, place)
        return place.masked_fill(~tree.exists, NONE) >= 0
