"""How often each continuation of a single row's matches was seen, as more and more of the matches are counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from policies.lookup.lone_trie import LoneTrie, log_of
from policies.lookup.matching import Matches
from policies.order import NONE


class Proposal(NamedTuple):
    """Nodes with their counts, and how often there was something to follow."""

    count: dict[int, int]
    total: int

    @property
    def score(self) -> float:
        """The sum of the nodes' path probabilities."""
        return sum(self.count.values()) / self.total


class Counted:
    """The continuations of S matches as one tree. Nodes are numbered by depth and, within it, by the match that came there first:
    depth * S + match. That orders equal ones."""

    def __init__(self, matches: Matches):
        self.length = [long for long in matches.length[0].tolist() if long > 0]
        self.width = matches.length.shape[1]
        self.behind = matches.behind[0].T.tolist()
        self.child: dict[tuple[int, int], int] = {}
        self.parent: dict[int, int] = {}
        self.token: dict[int, int] = {}
        self.seen: dict[int, int] = {}

    def by_length(self) -> Iterator[tuple[int, int]]:
        """(length, how many matches are as long or longer), the longest first; behind each, those are what is counted."""
        for match, long in enumerate(self.length):
            self._count(match)
            if match + 1 == len(self.length) or self.length[match + 1] < long:
                yield long, match + 1

    def _count(self, match: int) -> None:
        above = 0
        for depth, token in enumerate(self.behind[match], start=1):
            if token == NONE:
                return
            node = self.child.get((above, token))
            if node is None:
                node = self.child[above, token] = depth * self.width + match
                self.parent[node], self.token[node], self.seen[node] = above, token, 0
            self.seen[node] += 1
            above = node

    def proposal(self, total: int, least: float, nodes: int) -> Proposal:
        """The ``nodes`` most frequent, of equal ones the first; none that was seen less often than ``least`` * ``total``."""
        enough = float(np.float32(least) * np.float32(total))  # in the precision in which many rows are compared
        likely = [node for node, count in self.seen.items() if count >= enough]
        # a node counts at most as often as its parent, which has the lower number: the best are ancestor-closed
        likely.sort(key=lambda node: (-self.seen[node], node))
        return Proposal({node: self.seen[node] for node in likely[:nodes]}, total)

    def trie(self, proposal: Proposal) -> LoneTrie:
        """The proposed nodes, each with its share of its parent's count."""
        number = {0: 0} | {node: index for index, node in enumerate(sorted(proposal.count), start=1)}
        token, share, seat, below = [NONE], [1.0], [0], [[] for _ in number]
        for node, index in number.items():
            if index == 0:
                continue
            above = self.parent[node]
            token.append(self.token[node])
            share.append(proposal.count[node] / (proposal.count[above] if above else proposal.total))
            seat.append(node % self.width)
            below[number[above]].append(index)
        for family in below:
            family.sort(key=lambda index: -log_of(share[index]))  # equal ones stay in order
        return LoneTrie(token, share, seat, below, self.width)
