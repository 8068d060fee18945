"""A training-free rule as a drafter: replay and live decoding run this very object, each on its own past."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from policies.children import Children, Only
from policies.contract import Cycle
from policies.lookup.lone_trie import LoneTrie
from policies.lookup.past import Past
from policies.lookup.rule import Rule
from policies.lookup.trie import entropy
from policies.order import NONE, best
from policies.tree import DraftTree


class LookupDrafter:
    """Answers the drafting loop from the past; it looks only if a policy drafts. A child's handle is its place.

    The distribution that a rule proposes may not sum to 1 (a continuation may end with the text): log-probabilities are of
    the proposal as it is, entropies of the proposal renormalised.
    """

    deepest = None

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
        if isinstance(self._found, LoneTrie):
            return self._found.children(self._numbers(tree, nodes), branching)
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

    def chain_found(self) -> Iterator[Only] | None:
        """Behind the first level, if all that was found is a chain of a single row: what :meth:`expand` would answer to the level's
        node, to that one's child, and so on."""
        lone = isinstance(self._found, LoneTrie) and self._found.is_chain
        return self._found.below_the_first() if lone else None

    def _numbers(self, tree: DraftTree, nodes: Tensor) -> list[int]:
        """The numbers in what was found of the nodes int64 [1, W] of the one row, -1 = none."""
        asked = nodes[0].tolist()
        if all(node <= 0 for node in asked):  # the root, which has no handle
            return asked
        return [number if node > 0 else node for node, number in zip(asked, tree.at("handle", nodes)[0].tolist(), strict=True)]
