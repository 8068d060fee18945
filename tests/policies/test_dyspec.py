"""DySpec against its definition on distributions full of ties, and against the paper's two algorithms on proper ones."""

from __future__ import annotations

import heapq
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.dyspec import DySpec
from tests.policies.brute import Node, by_total_order, drafted, grow, inside, single
from tests.policies.records import decide
from tests.policies.synthetic import VOCABULARY, Language, SyntheticDrafter, cycle_at, mix
from tests.policies.test_against_brute_force import LANGUAGES, REACHES, compare


def dyspec(token, of, policy: DySpec, reach: int):
    """Level by level; what each node's slot is worth by its definition."""
    root = Node(token)
    nodes, value = [root], {id(root): single(1)}
    layer = nodes[:]
    for _ in range(policy.depth):

        def wanted(node: Node) -> bool:
            first = min(single(math.exp(float(node.score))), value[id(node)])
            ahead = [one for one in drafted(nodes) if value[id(one)] >= first and value[id(one)] > policy.threshold]
            return node is root or (first > policy.threshold and len(ahead) < policy.nodes)

        frontier = [node for node in by_total_order(layer)[: policy.width] if wanted(node)]
        layer = grow(nodes, inside(frontier, reach), of, lambda node: policy.top_k)
        for node in layer:
            before = math.fsum(math.exp(float(one.logprob)) for one in node.parent.children[: node.rank])
            slot = single(math.exp(float(node.parent.score)) * max(1 - before, 0.0))
            value[id(node)] = min(slot, value[id(node.parent)])
        if not layer:
            break
    able = [node for node in drafted(nodes) if value[id(node)] > policy.threshold]
    kept = by_total_order(able, lambda node: value[id(node)])[: policy.nodes]
    return nodes, [root, *sorted(kept, key=lambda node: node.index)]


@settings(max_examples=60, deadline=None)
@given(
    LANGUAGES,
    st.builds(
        DySpec,
        nodes=st.integers(1, 30),
        threshold=st.sampled_from([0.0, 0.0101, 0.201, 0.501]),
        width=st.integers(1, 6),
        top_k=st.integers(1, 6),
        depth=st.integers(1, 5),
    ),
    REACHES,
)
def test_dyspec(language, policy, reaches):
    compare(policy, language, reaches, lambda token, of, reach: dyspec(token, of, policy, reach))


class Proper(Language):
    """Distributions that add up to one and have no ties, some sharp, some flat."""

    def distribution(self, key, place, token):
        node = mix(self.seed, key, place, token).astype(np.int64)
        noise = mix(node[..., None], np.arange(VOCABULARY)) % np.uint64(10**6)
        sharpness = 1 + (mix(node, 5) % np.uint64(8)).astype(np.float64)
        logit = noise.astype(np.float64) / 10**6 * sharpness[..., None]
        logprob = logit - np.log(np.exp(logit).sum(-1, keepdims=True))
        tokens = np.argsort(-logprob, axis=-1, kind="stable")
        return tokens, np.take_along_axis(logprob, tokens, -1).astype(np.float32)


def algorithm_1(token: int, of, n: int) -> set[tuple[int, ...]]:
    """DySpec's algorithm 1 with its heap and its residual distributions; tokens in order of probability."""
    order = itertools.count()
    tree: set[tuple[int, ...]] = set()
    heap = [(-1.0, next(order), (), of(0, token, VOCABULARY), 1.0)]
    while len(tree) < n:
        negative, _, path, residual, rest = heapq.heappop(heap)
        (child, logprob), *others = residual
        share = math.exp(logprob) / rest  # R[y] of the renormalised residual
        node = (*path, child)
        tree.add(node)
        heapq.heappush(heap, (negative * (1 - share), next(order), path, others, rest - math.exp(logprob)))
        below = of(len(node), child, VOCABULARY)
        heapq.heappush(heap, (negative * share, next(order), node, below, 1.0))
    return tree


def paths(nodes: tuple, kept: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Tokens from the root to each kept node but the root."""

    def path(node: int) -> tuple[int, ...]:
        return () if nodes[node][1] < 0 else (*path(nodes[node][1]), nodes[node][0])

    return {path(node) for node in kept if node}


@pytest.mark.parametrize("seed", range(6))
def test_dyspec_is_the_greedy_algorithm(seed):
    """One forward per layer finds the tree for which algorithm 1 runs the draft on every node."""
    language, n = Proper(seed), 20
    texts = [language.truth(key, 3) for key in range(8)]
    policy = DySpec(nodes=n, width=n, top_k=VOCABULARY, depth=n)
    for key, got in enumerate(decide(policy, SyntheticDrafter(language, texts), cycle_at(list(range(8)), [1] * 8))):

        def of(depth: int, token: int, branching: int, key: int = key):
            return language.children_of(key, 1 + depth, token, branching)

        assert paths(got.nodes, got.kept) == algorithm_1(texts[key][1], of, n)
        assert len(got.widths) < n


def test_dyspec_with_a_threshold_is_algorithm_2():
    """A slot is filled if it is worth more than the threshold, whatever the tree's size."""
    language, threshold = Proper(3), 0.02
    texts = [language.truth(key, 3) for key in range(8)]
    policy = DySpec(nodes=10**4, threshold=threshold, width=200, top_k=VOCABULARY, depth=200)
    for key, got in enumerate(decide(policy, SyntheticDrafter(language, texts), cycle_at(list(range(8)), [0] * 8))):
        tree, leaves = set(), [((), texts[key][0], 1.0)]
        while leaves:
            path, token, value = leaves.pop()
            rest, children = 1.0, iter(language.children_of(key, len(path), token, VOCABULARY))
            here = value
            while here > threshold:
                child, logprob = next(children)
                share = math.exp(logprob) / rest
                tree.add((*path, child))
                leaves.append(((*path, child), child, here * share))
                here, rest = here * (1 - share), rest - math.exp(logprob)
        assert paths(got.nodes, got.kept) == tree
