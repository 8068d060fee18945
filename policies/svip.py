"""SVIP: stop drafting where the draft's entropy says that the target may disagree.

Zhang et al. 2024, "Draft Model Knows When to Stop: Self-Verification Speculative Decoding for Long-Form Generation"
(https://arxiv.org/abs/2411.18462), section 3: 1 - sqrt(c H) estimates a lower bound of the acceptance probability, H being
the entropy of the draft's next-token distribution.
"""

from __future__ import annotations

from torch import Tensor

from policies.contract import Cycle, State, require
from policies.registry import policy
from policies.stopping import StoppingChain, proposed_by
from policies.tree import DraftTree


@policy("svip", paper="https://arxiv.org/abs/2411.18462")
class Svip(StoppingChain):
    """A top-1 chain that ends with the first token for which sqrt(scale * entropy) exceeds a threshold.

    Entropy in nats, over the draft's whole vocabulary. The defaults are those of the authors' code: scale 0.15, threshold
    0.3 (that is 0.6 nats), at most 40 tokens.
    """

    threshold: float = 0.3
    scale: float = 0.15
    most: int = 40

    needs = frozenset({"entropy"})

    def __post_init__(self):
        require(self.threshold >= 0, self.name, f"threshold must be 0 or more, not {self.threshold}")
        require(self.scale >= 0, self.name, f"scale must be 0 or more, not {self.scale}")
        require(self.most >= 1, self.name, f"most must be 1 or more, not {self.most}")

    def goes_on(self, tree: DraftTree, last: Tensor, cycle: Cycle, state: State) -> Tensor:
        return (self.scale * proposed_by(tree, last).double()).sqrt() <= self.threshold
