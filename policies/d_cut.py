"""D-Cut: of all drafted tokens of the batch verify the likeliest quarter, half, three quarters or all, as pays best.

D-Cut (https://arxiv.org/abs/2607.14647): a token's score is the product of the draft's confidences up to it; the share of
tokens to verify is the one with the most expected tokens per millisecond of the step. Written from a summary of the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policies.contract import Cycle, Expansion, Policy, State, require
from policies.registry import policy
from policies.serving_batch import ServingBatches
from policies.step_time import cost_of, packed_ms
from policies.sums import exact_cumsum
from policies.tree import DraftTree


@policy("d_cut", paper="https://arxiv.org/abs/2607.14647")
class DCut(Policy):
    """Chains of ``k`` tokens, of which the batch verifies the likeliest share out of ``shares``.

    Expected tokens are one per request and the scores of what is verified. A step pays for the tokens there are, packed
    (``--ragged sum``). The shares and ``k`` = 8 are the paper's (it drafts blocks of 8 or 16 in one pass, we one by one).
    """

    k: int = 8
    shares: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)

    batch_wide = True

    def __post_init__(self):
        require(self.k >= 1, self.name, f"k must be 1 or more, not {self.k}")
        fine = len(self.shares) > 0 and all(0 <= share <= 1 for share in self.shares)
        require(fine, self.name, f"shares must lie between 0 and 1, not {self.shares}")

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        return Expansion(tree.frontier(1), 1) if tree.levels < self.k else None

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        cost, batches = cost_of(cycle, self.name), ServingBatches(cycle)
        entry, score = batches.ranked(tree.score.masked_fill(~tree.drafted(), -torch.inf))
        drafted = (entry >= 0).sum(1)
        share = torch.tensor(self.shares, dtype=torch.float64, device=entry.device)
        count = (share * drafted[:, None]).ceil().to(torch.int64)
        survival = torch.exp(score.to(torch.float64).contiguous())
        sums = exact_cumsum(torch.nn.functional.pad(survival, (1, 0)))
        expected = batches.size[:, None] + sums.gather(1, count)
        ms = packed_ms(cost, batches, self.k, batches.size[:, None] + count)
        choice = (expected / ms).argmax(1, keepdim=True)  # the first of equally good shares
        return batches.first(entry, count.gather(1, choice)[:, 0], tree.width)
