"""DySpec: the tree that greedy growth by estimated acceptance gives.

Xiong et al. 2024, "DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure"
(https://arxiv.org/abs/2410.11744), sections 4.1 to 4.4 and appendix A. A *slot* is a place for one more child of a
node. Its value is the estimated probability that verification gets there: the node's path probability, times that of
rejecting the children before (the draft's probability stands for acceptance). Slots are filled highest value first,
with the next most probable token here (the paper samples it), so a child of rank r fills a slot of value

    p(parent) * (1 - sum of q over the siblings of rank below r),

which is the paper's product of (1 - residual probability), multiplied out.

The paper finds this order hard to draft layer by layer, and then fixes a threshold instead (section 4.4). With
deterministic drafts both go together: values never grow along a path, so a node whose first slot is not among the n
best so far never gets a child, and one layer at a time may be expanded without missing any.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policies.contract import Cycle, Expansion, Policy, State, require
from policies.marks import with_marks
from policies.order import NONE, best
from policies.registry import policy
from policies.tree import DraftTree


@policy("dyspec", paper="https://arxiv.org/abs/2410.11744")
class DySpec(Policy):
    """Verify the nodes with the highest estimated probability of being tested, up to a budget or down to a threshold.

    ``nodes`` is the largest tree, the root not counted (published: 64, and 768 with an offloaded target). Slots of
    value ``threshold`` or less stay empty: 0 is the greedy algorithm 1, about 1 / nodes is algorithm 2, which has no
    other limit on its size.

    The rest is a capped form that lies inside the default recording: at most ``width`` nodes of a layer are expanded,
    into ``top_k`` children each, over ``depth`` layers. The paper has no such limits; ``dyspec(width=64, top_k=64,
    depth=64)`` is its tree.
    """

    nodes: int = 64
    threshold: float = 0.0
    width: int = 10
    top_k: int = 10
    depth: int = 14

    published = "dyspec(width=64, top_k=64, depth=64)"

    def __post_init__(self):
        for name in ("nodes", "width", "top_k", "depth"):
            require(getattr(self, name) >= 1, self.name, f"{name} must be 1 or more, not {getattr(self, name)}")
        require(0 <= self.threshold < 1, self.name, f"threshold must be at least 0 and below 1, not {self.threshold}")

    def begin(self, cycle: Cycle, state: State) -> State:
        """The value of the slot that each node fills: float64 [B, N] holding float32 numbers, 1 for the root."""
        rows, device = cycle.active.shape[0], cycle.active.device
        return state | {"value": torch.ones((rows, 1), dtype=torch.float64, device=device)}

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        if tree.levels == 0:
            return Expansion(tree.root_nodes(), self.top_k)
        index, value = self.slots(tree, state["value"])
        state["value"] = with_marks(tree, state["value"], index, value)
        if tree.levels == self.depth:
            return None
        nodes = tree.frontier(self.width)
        place = nodes.clamp(min=0)
        first_slot = _probability(tree.score.gather(1, place)).minimum(state["value"].gather(1, place))
        worth_it = (first_slot > self.threshold) & (first_slot > self.cut(tree, state["value"]))
        return Expansion(nodes.masked_fill(~worth_it, NONE), self.top_k)

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        place = best(self.candidates(tree, state["value"]), self.nodes)
        return torch.zeros_like(tree.exists).scatter(1, place.clamp(min=0), place >= 0)

    def slots(self, tree: DraftTree, known: Tensor) -> tuple[Tensor, Tensor]:
        """The newest nodes int64 [B, M], -1 = none, and the values of the slots they fill: float64 [B, M].

        A value is at most that of the parent's slot, also where rounding, or a draft vocabulary whose probabilities
        do not add up to 1, would have it otherwise.
        """
        index, _ = tree.newest()
        place = index.clamp(min=0)
        rank, parent = tree.rank.gather(1, place), tree.parent.gather(1, place).clamp(min=0)
        probability = torch.exp(tree.logprob.gather(1, place).to(torch.float64).contiguous())
        before = torch.zeros_like(probability)
        for back in range(1, min(self.top_k, index.shape[1])):  # siblings stand side by side, in order of rank
            sibling = torch.where(rank[:, back:] >= back, probability[:, :-back], 0.0)
            before[:, back:] = before[:, back:] + sibling
        value = torch.exp(tree.score.gather(1, parent).to(torch.float64).contiguous()) * (1 - before).clamp(min=0)
        return index, value.to(torch.float32).to(torch.float64).minimum(known.gather(1, parent))

    def candidates(self, tree: DraftTree, value: Tensor) -> Tensor:
        """Values float32 [B, N] of the drafted nodes above the threshold, -inf elsewhere."""
        eligible = tree.drafted() & (value > self.threshold)
        return value.to(torch.float32).masked_fill(~eligible, -torch.inf)

    def cut(self, tree: DraftTree, value: Tensor) -> Tensor:
        """Value float64 [B, 1] that a slot has to exceed: of the last node that the budget holds; -inf with room left."""
        if tree.width <= self.nodes:
            return torch.full((tree.rows, 1), -torch.inf, dtype=torch.float64, device=tree.device)
        return self.candidates(tree, value).topk(self.nodes, dim=1).values[:, -1:].to(torch.float64)


def _probability(score: Tensor) -> Tensor:
    """exp(score), float64 holding float32 numbers."""
    return torch.exp(score.to(torch.float64).contiguous()).to(torch.float32).to(torch.float64)
