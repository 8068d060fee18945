"""What may follow a single row in the host's memory, as plain lists: a trie of few nodes, asked about a few times.

The same proposals as `policies.lookup.trie` makes for many rows at once; a test compares them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from policies.children import Children, Only
from policies.lookup.trie import entropy
from policies.one_row import integers
from policies.order import NONE


class LoneTrie(NamedTuple):
    """Nodes by number, of which 0 is the root.

    token  the node's token; the root's is not asked for
    share  its probability given its parent, above 0
    seat   its place among its siblings, which orders equal ones and tells which of them meet in a sum
    below  its children, most probable first
    width  how many seats there are
    """

    token: list[int]
    share: list[float]
    seat: list[int]
    below: list[list[int]]
    width: int

    def children(self, places: list[int], branching: int) -> Children:
        """The first ``branching`` children of nodes by number (-1 = none), as a drafter answers."""
        families = [self.below[place] if place >= 0 else [] for place in places]
        if len(places) == 1 and len(families[0]) < 2 and branching > 0:
            return self._only(families[0], places[0]).children()
        entropies = [self._entropy(family) if place >= 0 else -1.0 for place, family in zip(places, families, strict=True)]
        count = min(branching, max(map(len, families), default=0) or 1)
        spare = [NONE] * count
        shown = [(family + spare)[:count] for family in families]
        token = [[self.token[node] if node >= 0 else NONE for node in family] for family in shown]
        logprob = [[log_of(self.share[node]) if node >= 0 else -np.inf for node in family] for family in shown]
        return Children(
            token=integers([token]),
            logprob=torch.from_numpy(np.array([logprob], dtype=np.float32)),
            entropy=torch.from_numpy(np.array([entropies], dtype=np.float32)),
            handle=integers([shown]),
        )

    def _only(self, family: list[int], place: int) -> Only:
        """The same for one node with one child or none: most of what is looked up is a chain."""
        doubt = self._entropy(family) if place >= 0 else -1.0
        if not family:
            return Only(NONE, -np.inf, doubt, NONE)
        (node,) = family
        return Only(self.token[node], log_of(self.share[node]), doubt, node)

    @property
    def is_chain(self) -> bool:
        """Whether there is one node below the root, and below each at most one."""
        return max(map(len, self.below)) == 1

    def below_the_first(self) -> Iterator[Only]:
        """Of a chain: what there is below its first node, below the next, and so on; below the last nothing."""
        (node,) = self.below[0]
        while node >= 0:
            answer = self._only(self.below[node], node)
            yield answer
            node = answer.handle

    def _entropy(self, family: list[int]) -> float:
        if not family:
            return 0.0
        return entropy_of(tuple((self.seat[node], self.share[node]) for node in family), self.width)


def chain(tokens: list[int]) -> LoneTrie:
    """One continuation, and certain."""
    numbers = range(1, len(tokens) + 1)
    return LoneTrie([NONE, *tokens], [1.0] * (len(tokens) + 1), [0] * (len(tokens) + 1), [*([number] for number in numbers), []], 1)


@lru_cache(maxsize=4096)
def log_of(share: float) -> float:
    """The logarithm of a probability as float32, to the bit what it is among others."""
    return float(torch.log(torch.tensor([share], dtype=torch.float64)).to(torch.float32))


@lru_cache(maxsize=4096)
def entropy_of(shares: tuple[tuple[int, float], ...], width: int) -> float:
    """The entropy float32 (nats) of a proposal of (seat, probability), to the bit what it is among others."""
    probability = torch.zeros(1, 1, width, dtype=torch.float64)
    for seat, share in shares:
        probability[0, 0, seat] = share
    return float(entropy(probability))
