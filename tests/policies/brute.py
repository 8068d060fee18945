"""Tree builders that are slow and obviously right: plain lists, one node at a time, no tensor, no code of the product.

Written from the papers' rules, not from the implementation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

ChildrenOf = Callable[[int, int, int], list[tuple[int, np.float32]]]
"""(depth of a node, its token, how many) -> its children's (token, log-probability), most probable first."""


@dataclass
class Node:
    token: int
    parent: Node | None = None
    depth: int = 0
    rank: int = -1
    logprob: np.float32 = np.float32(0)
    score: np.float32 = np.float32(0)
    index: int = 0
    entropy: float = -1.0
    children: list[Node] = field(default_factory=list)

    def path(self) -> tuple[int, ...]:
        return () if self.parent is None else self.parent.path() + (self.token,)


def by_total_order(nodes: list[Node], score: Callable[[Node], float] = lambda node: node.score) -> list[Node]:
    return sorted(nodes, key=lambda node: (-float(score(node)), node.index))


def single(value: float) -> np.float32:
    return np.float32(value)


def drafted(nodes: list[Node]) -> list[Node]:
    return [node for node in nodes if node.parent is not None]


def inside(nodes: list[Node], reach: int) -> list[Node]:
    """Nodes that may be expanded, as their children still fit into the context."""
    return [node for node in nodes if node.depth < reach]


def grow(
    nodes: list[Node], frontier: list[Node], children_of: ChildrenOf, branching: Callable[[Node], int]
) -> list[Node]:
    """Expand the frontier in total order; the new nodes, also appended to ``nodes``."""
    level = []
    for parent in by_total_order(frontier):
        for rank, (token, logprob) in enumerate(children_of(parent.depth, parent.token, branching(parent))):
            child = Node(token, parent, parent.depth + 1, rank, logprob, np.float32(parent.score + logprob), len(nodes))
            parent.children.append(child)
            nodes.append(child)
            level.append(child)
        parent.entropy = renormalised_entropy([child.logprob for child in parent.children])
    return level


def renormalised_entropy(logprobs: list[np.float32]) -> float:
    if not logprobs:
        return 0.0
    total = sum(math.exp(float(p)) for p in logprobs)
    shares = [math.exp(float(p)) / total for p in logprobs]
    return float(np.float32(-sum(share * math.log(share) for share in shares)))


def beam(root: Node, children_of: ChildrenOf, top_k: int, depth: int, reach: int) -> tuple[list[Node], list[Node]]:
    """EAGLE's expansion: (all nodes, newest level)."""
    nodes, level = [root], [root]
    for _ in range(depth):
        frontier = [node for node in by_total_order(level)[:top_k] if node.depth < reach]
        if not frontier:
            return nodes, []
        level = grow(nodes, frontier, children_of, lambda node: top_k)
    return nodes, level


def keep_best(nodes: list[Node], total_tokens: int) -> list[Node]:
    """EAGLE's re-ranking: root and the best others, in node order."""
    drafted = [node for node in nodes if node.parent is not None]
    chosen = by_total_order(drafted)[: total_tokens - 1]
    return [nodes[0], *sorted(chosen, key=lambda node: node.index)]


def eagle3(token: int, children_of: ChildrenOf, total_tokens: int, depth: int, top_k: int, reach: int = 10**6):
    """(all nodes, kept nodes)."""
    nodes, _ = beam(Node(token), children_of, top_k, depth, reach)
    return nodes, keep_best(nodes, total_tokens)


def chain(token: int, children_of: ChildrenOf, k: int, reach: int = 10**6):
    nodes, _ = beam(Node(token), children_of, 1, k, reach)
    return nodes, nodes


def static(token: int, children_of: ChildrenOf, paths: set[tuple[int, ...]], reach: int = 10**6):
    """A fixed tree of child ranks."""

    def place(node: Node) -> tuple[int, ...]:
        return () if node.parent is None else place(node.parent) + (node.rank,)

    def fanout(node: Node) -> int:
        ranks = [path[-1] for path in paths if path[:-1] == place(node)]
        return max(ranks) + 1 if ranks else 0

    nodes = [Node(token)]
    level = nodes[:]
    while True:
        frontier = [n for n in level if (n.parent is None or place(n) in paths) and fanout(n) and n.depth < reach]
        if not frontier:
            break
        level = grow(nodes, frontier, children_of, fanout)
    return nodes, [node for node in nodes if node.parent is None or place(node) in paths]


@dataclass
class HeteroRules:
    """Section 3's table for one setting, written out by the test: per stratum (extra levels, tokens with the root)."""

    edges: list[float]
    actions: list[tuple[int, int]]
    confidence: str = "cumulative"


def heterospec(token: int, children_of: ChildrenOf, depth: int, top_k: int, rules: HeteroRules, reach: int = 10**6):
    """(all nodes, kept nodes, stratum, entropy, rank)."""
    nodes, level = beam(Node(token), children_of, top_k, depth, reach)

    def confidence(node: Node) -> float:
        return node.score if rules.confidence == "cumulative" else node.logprob

    ends = by_total_order([node for node in nodes if node.depth == depth], confidence)
    stratum, entropy, rank = len(rules.edges), math.nan, 0
    if ends:
        end = ends[0]
        on_path, node = [], end
        while node.parent is not None:
            node = node.parent
            on_path.append(node.entropy)
        entropy = float(np.float32(sum(on_path)))
        stratum = sum(entropy > edge for edge in rules.edges)
        rank = 1 + by_total_order([node for node in nodes if node.parent is not None], confidence).index(end)
    extra, tokens = rules.actions[stratum]
    for _ in range(extra):
        frontier = [node for node in by_total_order(level)[:top_k] if node.depth < reach]
        if not frontier:
            break
        level = grow(nodes, frontier, children_of, lambda node: top_k)
    return nodes, keep_best(nodes, tokens), stratum, entropy, rank


def walk(kept: list[Node], text: list[int]) -> tuple[list[Node], int]:
    """(accepted nodes, bonus token; -1 where the text has ended); ``text`` is the truth behind the root."""
    node, accepted = kept[0], []
    for token in text:
        follower = [child for child in node.children if child.token == token and any(child is k for k in kept)]
        if not follower:
            return accepted, token
        node = follower[0]
        accepted.append(node)
    return accepted, -1
