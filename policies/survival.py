"""A survival threshold: draft, and verify, while the whole chain is probable enough.

The static form of the confidence threshold that DSpark (https://arxiv.org/abs/2607.05147) and D-Cut
(https://arxiv.org/abs/2607.14647) compare with: the survival of a token is the product of the draft's probabilities up to
and including its own.
"""

from __future__ import annotations

import math

from torch import Tensor

from policies.contract import Cycle, State, require
from policies.registry import policy
from policies.stopping import StoppingChain
from policies.tree import DraftTree


@policy("survival", paper="https://arxiv.org/abs/2607.05147")
class Survival(StoppingChain):
    """A top-1 chain of the tokens whose path probability is at least a threshold; the one that fails is not verified.

    Dropping a token for its own probability is exact here because the draft is deterministic. The default threshold is
    ours: no value is published.
    """

    threshold: float = 0.3
    most: int = 20

    def __post_init__(self):
        require(0 < self.threshold <= 1, self.name, f"threshold must be above 0 and at most 1, not {self.threshold}")
        require(self.most >= 1, self.name, f"most must be 1 or more, not {self.most}")

    def goes_on(self, tree: DraftTree, last: Tensor, cycle: Cycle, state: State) -> Tensor:
        return self._probable(tree).gather(1, last)[:, 0]

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        return tree.exists & self._probable(tree)

    def _probable(self, tree: DraftTree) -> Tensor:
        """bool [B, N]; ancestor-closed, as no child's path is more probable than its parent's."""
        return tree.score.double() >= math.log(self.threshold)
