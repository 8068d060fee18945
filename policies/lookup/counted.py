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
    """The continuations of S matches, in any order, as one tree. Nodes are numbered by depth and, within it, by the first match
    that comes there, counted or not: depth * S + match. That orders equal ones."""

    def __init__(self, matches: Matches):
        self.length = {match: long for match, long in enumerate(matches.length[0].tolist()) if long > 0}
        self.width = matches.length.shape[1]
        self.parent: dict[int, int] = {}
        self.token: dict[int, int] = {}
        child: dict[tuple[int, int], int] = {}
        behind = matches.behind[0].T.tolist()
        self.nodes = {match: self._follow(match, behind[match], child) for match in self.length}
        self.seen = dict.fromkeys(self.parent, 0)
        self.below: dict[int, list[int]] = {}
        for node, above in self.parent.items():
            self.below.setdefault(above, []).append(node)

    def _follow(self, match: int, tokens: list[int], child: dict[tuple[int, int], int]) -> list[int]:
        """The nodes that a match passes through; those that it comes to first are new."""
        path, above = [], 0
        for depth, token in enumerate(tokens, start=1):
            if token == NONE:
                break
            node = child.setdefault((above, token), depth * self.width + match)
            if node not in self.parent:
                self.parent[node], self.token[node] = above, token
            path.append(node)
            above = node
        return path

    def by_length(self) -> Iterator[tuple[int, int]]:
        """(length, how many matches are as long or longer), the longest first; behind each, those are what is counted."""
        counted = 0
        for long in range(max(self.length.values(), default=0), 0, -1):
            for match, own in self.length.items():
                if own == long:
                    counted += 1
                    for node in self.nodes[match]:
                        self.seen[node] += 1
            yield long, counted

    def tree(self, total: int, least: float, nodes: int, levels: int) -> Proposal:
        """The ``nodes`` most frequent of so many levels, of equal ones the first; none that was seen less often than ``least`` *
        ``total``."""
        enough, end = _enough(total, least), (levels + 1) * self.width
        likely = [node for node, count in self.seen.items() if 0 < count >= enough and node < end]
        # a node counts at most as often as its parent, which has the lower number: the best are ancestor-closed
        likely.sort(key=lambda node: (-self.seen[node], node))
        return Proposal({node: self.seen[node] for node in likely[:nodes]}, total)

    def path(self, total: int, least: float, nodes: int, levels: int) -> Proposal:
        """The same for the path that goes to the most frequent child, of equal ones the first."""
        enough, above, chosen = _enough(total, least), 0, {}
        for _ in range(min(nodes, levels)):
            child = max(self.below.get(above, ()), key=lambda node: (self.seen[node], -node), default=0)
            if not 0 < self.seen.get(child, 0) >= enough:
                break
            chosen[child], above = self.seen[child], child
        return Proposal(chosen, total)

    def trie(self, proposal: Proposal) -> LoneTrie:
        """The proposed nodes, each with its share of its parent's count."""
        nodes, count = sorted(proposal.count), {0: proposal.total} | proposal.count
        number = {0: 0} | {node: index for index, node in enumerate(nodes, start=1)}
        token = [NONE, *(self.token[node] for node in nodes)]
        share = [1.0, *(count[node] / count[self.parent[node]] for node in nodes)]
        seat = [0, *(node % self.width for node in nodes)]
        below: list[list[int]] = [[] for _ in number]
        for node in nodes:
            below[number[self.parent[node]]].append(number[node])
        for family in below:
            family.sort(key=lambda index: -log_of(share[index]))  # equal ones stay in order
        return LoneTrie(token, share, seat, below, self.width)


def _enough(total: int, least: float) -> float:
    """``least`` * ``total`` in the precision in which many rows are compared."""
    return float(np.float32(least) * np.float32(total))
