"""Expected value: draft one more token where the target time it is expected to save exceeds what it costs.

The greedy rule behind SpecDec++'s threshold (https://arxiv.org/abs/2405.19715, section 4) and SmartSpec's goodput
(https://arxiv.org/abs/2406.14066), written out for one chain: token k + 1 saves a plain decoding step with the probability
that the target takes all of the first k + 1; it costs a draft forward and one more token to verify.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from policies.acceptance import WatchedChain, calibration_lines, chain_columns, estimate_last, fit_weights, graded
from policies.contract import Cycle, Expansion, Policy, State, require
from policies.cost import Cost
from policies.errors import UserError
from policies.order import NONE
from policies.registry import policy
from policies.stopping import StoppingChain, last_token
from policies.tree import DraftTree


@policy("expected_value", paper="https://arxiv.org/abs/2405.19715")
class ExpectedValue(StoppingChain):
    """A top-1 chain drafted, and then verified, as long as one more token is expected to pay for itself.

    Times come from the cost model. Without one, ``draft_share`` is a draft forward's time and ``verify_share`` that of
    one more token to verify, each in plain decoding steps (the c of Leviathan et al. 2023). Where even the first token
    does not pay, nothing is drafted. ``weights_``: the acceptance estimate (policies/acceptance.py); ``next_``: how often
    a token is taken when all before it were, which stands for the token that is not drafted yet.
    """

    most: int = 20
    draft_share: float | None = None
    verify_share: float = 0.0
    weights_: tuple[float, ...] | None = None
    next_: float | None = None

    needs = frozenset({"entropy"})

    def __post_init__(self):
        require(self.most >= 1, self.name, f"most must be 1 or more, not {self.most}")
        fine = self.draft_share is None or self.draft_share >= 0
        require(fine, self.name, f"draft_share must be 0 or more, not {self.draft_share}")
        require(self.verify_share >= 0, self.name, f"verify_share must be 0 or more, not {self.verify_share}")
        require(self.weights_ is None or len(self.weights_) == 4, self.name, f"weights_ must be 4 numbers, not {self.weights_}")

    def begin(self, cycle: Cycle, state: State) -> State:
        """survival: float64 [B, most + 1], estimated chance that the target takes all tokens up to each depth."""
        survival = torch.zeros((len(cycle.sequence), self.most + 1), dtype=torch.float64, device=cycle.sequence.device)
        survival[:, 0] = 1
        return {"survival": survival}

    def expand(self, tree: DraftTree, cycle: Cycle, state: State) -> Expansion | None:
        last, level = last_token(tree), tree.levels
        if level > 0:
            taken = estimate_last(self.weights_, tree, last.clamp(min=0)).masked_fill(last[:, 0] < 0, 0)
            state["survival"][:, level] = state["survival"][:, level - 1] * taken
        if level == self.most:
            return None
        plain, draft, verify = self._times(cycle, level)
        pays = state["survival"][:, level] * self.next_ * plain > draft + verify
        return Expansion(last.masked_fill(~pays[:, None], NONE), 1)

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        """The prefix whose expected saving less its verification is largest; the shortest of equal ones."""
        value = best = torch.zeros_like(state["survival"][:, 0])
        length = torch.zeros_like(cycle.sequence)
        for depth in range(1, tree.width):
            plain, _, verify = self._times(cycle, depth - 1)
            value = value + (state["survival"][:, depth] * plain - verify)
            length = torch.where(value > best, depth, length)
            best = torch.maximum(value, best)
        return tree.exists & (tree.depth <= length[:, None])

    def _times(self, cycle: Cycle, level: int) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        """(plain step, draft forward behind ``level`` drafted tokens, one more token to verify): ms float64 [B], or shares."""
        if cycle.cost is None:
            if self.draft_share is None:
                raise UserError(
                    f"policy '{self.name}' needs a cost model: pass --profile FILE, or {self.name}(draft_share=0.1), "
                    "a draft forward's time in plain decoding steps"
                )
            return 1.0, self.draft_share, self.verify_share
        return times(cycle.cost, cycle, level)

    def fit_base(self) -> Policy:
        return WatchedChain(self.most)

    def measure(self, tree: DraftTree, cycle: Cycle) -> dict[str, Tensor]:
        return chain_columns(tree, cycle, self.most)

    def fit(self, samples: Any) -> ExpectedValue:
        return replace(self, weights_=fit_weights(samples), next_=float(graded(samples)[1].mean()))

    def describe_fit(self, samples: Any) -> list[str]:
        return calibration_lines(self.weights_, samples)


def times(cost: Cost, cycle: Cycle, level: int) -> tuple[Tensor, Tensor, Tensor]:
    """The three times of :meth:`ExpectedValue._times` under a cost model, float64 [B] (ms)."""
    context, batch, one = cycle.context_length, group_size(cycle), torch.ones_like(cycle.sequence)
    plain = cost.verify_ms(one, context, batch) + cost.commit_ms(one, batch) + cost.overhead_ms(0 * one, batch)
    draft = cost.draft_ms(one, context + level, batch) if level else cost.catch_up_ms(one, context, batch)
    draft = draft + (cost.overhead_ms((level + 1) * one, batch) - cost.overhead_ms(level * one, batch))
    verify = cost.verify_ms((level + 2) * one, context, batch) - cost.verify_ms((level + 1) * one, context, batch)
    return plain, draft, verify


def group_size(cycle: Cycle) -> Tensor:
    """Active rows that decode together with each row, itself included: int64 [B]."""
    _, place = cycle.group.unique(return_inverse=True)
    count = torch.zeros_like(cycle.group).scatter_add(0, place, cycle.active.to(torch.int64))
    return count[place].clamp(min=1)
