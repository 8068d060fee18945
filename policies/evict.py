"""EVICT: draft EAGLE-3's tree, and verify the likeliest part of it that emits most per millisecond of verification.

Pan et al. 2026, "Making Every Verified Token Count: Adaptive Verification for MoE Speculative Decoding"
(https://arxiv.org/abs/2605.00342): nodes sorted by path probability, cut where expected tokens over the profiled time of
verifying them is largest; more tokens wake more experts, so verification is what costs. Written from a summary of the paper;
its calibration factor is the same for every cut and changes nothing in where the largest lies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policies.contract import Cycle, State
from policies.eagle3 import Eagle3
from policies.order import best
from policies.registry import policy
from policies.serving_batch import ServingBatches
from policies.step_time import cost_of
from policies.sums import exact_cumsum
from policies.tree import DraftTree


@policy("evict", paper="https://arxiv.org/abs/2605.00342")
class Evict(Eagle3):
    """EAGLE-3's tree, of which the best n nodes are verified: the n with most expected tokens per verification time.

    Each request decides for itself; of its batch it sees how many requests there are, and how long the longest context is.
    Expected tokens are 1 (the target's own) and the path probabilities of what is verified.
    """

    batch_wide = True

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        batches = ServingBatches(cycle)
        context, rows = batches.to_rows(batches.context)[:, None], batches.to_rows(batches.size.clamp(min=1))[:, None]
        node = best(tree.score.masked_fill(~tree.drafted(), -torch.inf), min(self.total_tokens - 1, tree.width))
        score = tree.score.gather(1, node.clamp(min=0)).masked_fill(node < 0, -torch.inf)
        chance = torch.exp(score.to(torch.float64).contiguous())
        count = torch.arange(node.shape[1] + 1, device=node.device)[None]
        ms = cost_of(cycle, self.name).verify_ms(count + 1, context, rows)
        worth = (1 + exact_cumsum(torch.nn.functional.pad(chance, (1, 0)))) / ms
        most = worth.masked_fill(count > (node >= 0).sum(1, keepdim=True), -torch.inf).argmax(1)
        kept = (node >= 0) & (count[:, :-1] < most[:, None])
        return torch.zeros_like(tree.exists).scatter(1, node.clamp(min=0), kept)
