"""A training-free rule as a drafter: replay and live decoding run this very object, each on its own past."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from policies.children import Children
from policies.contract import Cycle
from policies.lookup.past import Past
from policies.lookup.rule import Rule
from policies.lookup.trie import Trie
from policies.order import NONE, best
from policies.sums import ordered_sum
from policies.tree import DraftTree


class LookupDrafter:
    """Answers the drafting loop from the past; it looks only if a policy drafts. A child's handle is its place.

    The distribution that a rule proposes may not sum to 1 (a continuation may end with the text): log-probabilities are of
    the proposal as it is, entropies of the proposal renormalised.
    """

    def __init__(self, rule: Rule, past: Callable[[Cycle], Past]):
        """:param past: what the rows of a cycle have committed."""
        self.rule, self._past_of = rule, past

    def begin(self, cycle: Cycle) -> None:
        """Start a cycle whose root tokens somebody else knows."""
        self._past = self._past_of(cycle)
        self._found: Any = None

    def root(self, cycle: Cycle) -> Tensor:
        self.begin(cycle)
        return self._past.text[self._past.root]

    def expand(self, tree: DraftTree, nodes: Tensor, branching: int) -> Children:
        if tree.levels == 0:
            self._found = self.rule.look(self._past)
            self._chain = self._found.chain() if isinstance(self._found, Trie) else None
        if self._chain is not None and nodes.numel() == 1 and branching > 0:
            return self._next_of_chain(tree, nodes)
        place = torch.where(nodes == 0, 0, tree.at("handle", nodes)).masked_fill(nodes < 0, NONE)
        token = tree.at("token", nodes).masked_fill(nodes < 0, NONE)
        offered = self.rule.propose(self._found, place, token)
        probability = offered.probability.masked_fill((nodes < 0)[:, :, None], 0.0)
        logprob = torch.log(probability).to(torch.float32)
        chosen = best(logprob, branching)
        known, none = chosen.clamp(min=0), chosen < 0
        return Children(
            token=offered.token.gather(2, known).masked_fill(none, NONE),
            logprob=logprob.gather(2, known).masked_fill(none, -torch.inf),
            entropy=entropy(probability).masked_fill(nodes < 0, -1.0),
            handle=offered.place.gather(2, known).masked_fill(none, NONE),
        )

    def _next_of_chain(self, tree: DraftTree, nodes: Tensor) -> Children:
        """The one child of the one node, certain: where all that was found is a chain, it need not be worked out as a tree."""
        node = int(nodes)
        place = node if node <= 0 else int(tree.at("handle", nodes))
        there = 0 <= place < len(self._chain)
        return Children(
            token=torch.full((1, 1, 1), self._chain[place] if there else NONE),
            logprob=_number(0.0 if there else -torch.inf, 3),
            entropy=_number(0.0 if node >= 0 else -1.0, 2),
            handle=torch.full((1, 1, 1), place + 1 if there else NONE),
        )


@lru_cache(maxsize=8)
def _number(value: float, axes: int) -> Tensor:
    """A number as float32 [1, ...], made once; nobody writes into it."""
    return torch.full((1,) * axes, value, dtype=torch.float32)


def entropy(probability: Tensor) -> Tensor:
    """Entropy float32 [B, W] (nats) of proposals float64 [B, W, C] renormalised; 0 where there is none."""
    total = ordered_sum(probability, probability.shape[2])
    weighted = ordered_sum(torch.special.xlogy(probability, probability), probability.shape[2])
    safe = torch.where(total > 0, total, 1.0)
    return (torch.log(safe) - weighted / safe).clamp(min=0.0).to(torch.float32)


