"""Made-up texts for the training-free drafters, and everything that a drafter proposes on them."""

from __future__ import annotations

import math
import random

import torch

from policies.lookup.drafter import LookupDrafter
from policies.lookup.past import Past
from policies.lookup.rule import load_rule
from policies.tree import DraftTree

TOP = 8


def texts(seed: int, rows: int = 6, length: int = 60, vocabulary: int = 4) -> list[list[int]]:
    """Random texts that repeat themselves: new tokens, or a stretch copied from before."""
    rng, made = random.Random(seed), []
    for _ in range(rows):
        text = [rng.randrange(vocabulary)]
        while len(text) < length:
            start = rng.randrange(len(text))
            text += text[start : start + rng.randrange(1, 9)] if rng.random() < 0.5 else [rng.randrange(vocabulary)]
        made.append(text[:length])
    return made


def past_of(rows: list[list[int]], roots: list[int], prompt: int, seed: int = 0) -> Past:
    """The rows cut behind their roots, with made-up target distributions for all generated tokens."""
    lengths = torch.tensor([len(row) for row in rows])
    first = lengths.cumsum(0) - lengths
    top = torch.randn((int(lengths.sum()), TOP), generator=torch.Generator().manual_seed(seed)).sort(1, descending=True).values
    token = torch.stack([torch.randperm(TOP, generator=torch.Generator().manual_seed(i)) for i in range(len(top))])
    text, root, told = torch.tensor(sum(rows, [])), first + torch.tensor(roots), first + prompt + 1
    return Past(text, first, root, token, top.log_softmax(1), torch.zeros_like(first), told)


def tree_of(spec: str, past: Past, levels: int = 5, branching: int = 12) -> list[dict[tuple[int, ...], tuple[float, float]]]:
    """Everything proposed down to a depth, expanding all nodes: per row (log-probability, entropy of its parent) by path."""
    drafter = LookupDrafter(load_rule(spec), lambda cycle: past)
    tree = DraftTree(drafter.root(None), frozenset({"entropy"}))
    nodes = tree.root_nodes()
    for _ in range(levels):
        tree.append(nodes, drafter.expand(tree, nodes, branching))
        nodes = tree.frontier(10**6)
        nodes = nodes[:, (nodes >= 0).any(0)]
        if not nodes.numel():
            break
    found = []
    for row in range(tree.rows):
        paths: dict[int, tuple[int, ...]] = {0: ()}
        mine = {}
        for node in range(1, int(tree.size[row])):
            parent = int(tree.parent[row, node])
            paths[node] = (*paths[parent], int(tree.token[row, node]))
            mine[paths[node]] = (float(tree.logprob[row, node]), float(tree.entropy[row, parent]))
        found.append(mine)
    return found


def logprobs(tree: dict[tuple[int, ...], tuple[float, float]]) -> dict[tuple[int, ...], float]:
    return {path: value for path, (value, _) in tree.items()}


def by_path(found: dict[tuple[int, ...], tuple[float, float]]) -> dict[tuple[int, ...], float]:
    """Path probabilities of the nodes."""
    total: dict[tuple[int, ...], float] = {(): 0.0}
    for path, (logprob, _) in found.items():  # parents come first
        total[path] = total[path[:-1]] + logprob
    return {path: math.exp(value) for path, value in total.items() if path}
