"""Kangaroo's second early exit: stop drafting once the draft is no longer sure of its token.

Liu et al. 2024, "Kangaroo: Lossless Self-Speculative Decoding via Double Early Exiting"
(https://arxiv.org/abs/2404.18911), section 3.2. BiLD's fallback (https://arxiv.org/abs/2302.07863) has the same form.
Only the stopping rule is here: the draft model is whatever was recorded.
"""

from __future__ import annotations

import math

from torch import Tensor

from policies.contract import Cycle, State, require
from policies.registry import policy
from policies.stopping import StoppingChain
from policies.tree import DraftTree


@policy("kangaroo", paper="https://arxiv.org/abs/2404.18911")
class Kangaroo(StoppingChain):
    """A top-1 chain that ends with the first token whose draft probability is below a threshold.

    The defaults are those of the authors' command line (``--threshold 0.6 --steps 6``).
    """

    threshold: float = 0.6
    most: int = 6

    def __post_init__(self):
        require(0 < self.threshold <= 1, self.name, f"threshold must be above 0 and at most 1, not {self.threshold}")
        require(self.most >= 1, self.name, f"most must be 1 or more, not {self.most}")

    def goes_on(self, tree: DraftTree, last: Tensor, cycle: Cycle, state: State) -> Tensor:
        return tree.logprob.gather(1, last)[:, 0].double() >= math.log(self.threshold)
