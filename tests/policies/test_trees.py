"""The published tree policies against their papers' algorithms in plain Python, on distributions full of ties."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.c2t import C2T
from policies.ddd import DynamicDepth
from policies.drafting import draft
from policies.opt_tree import OptTree
from policies.sequoia import Sequoia, best_trees, expected_tokens, paths_of
from policies.static import Static
from policies.sums import ordered_sum, probability_mass
from policies.talon import Talon
from tests.policies import brute
from tests.policies.brute import Node, by_total_order, drafted, grow, inside, keep_best, single
from tests.policies.synthetic import Language, SyntheticDrafter, cycle_at, fresh, mix
from tests.policies.test_against_brute_force import LANGUAGES, REACHES, ROWS, compare

FAR = [10**6] * ROWS


def mass(nodes: list[Node], count: int) -> np.float32:
    """Sum of the highest path probabilities."""
    return single(math.fsum(math.exp(float(node.score)) for node in by_total_order(nodes)[:count]))


# OPT-Tree ------------------------------------------------------------------------------------------------------------


def opt_tree(token, of, n: int, threshold: float, depth: int, width: int, reach: int):
    """Algorithm 1: draft a layer, then go on while the n best of all layers have gained more than the threshold."""
    nodes, expected = [Node(token)], single(0)
    layer = nodes
    for levels in range(depth):
        if levels:
            now = mass(drafted(nodes), n)
            gain, expected = now - expected, now
            if not gain > single(threshold):
                break
        layer = grow(nodes, inside(by_total_order(layer)[:width], reach), of, lambda node: width)
        if not layer:
            break
    return nodes, keep_best(nodes, n + 1)


@settings(max_examples=50, deadline=None)
@given(LANGUAGES, st.integers(1, 30), st.sampled_from([0.0, 0.05, 0.5, 2.0]), st.integers(1, 5), st.integers(1, 6), REACHES)
def test_opt_tree(language, n, threshold, depth, width, reaches):
    policy = OptTree(n, threshold, depth, width)
    compare(policy, language, reaches, lambda token, of, reach: opt_tree(token, of, n, threshold, depth, width, reach))


def test_opt_tree_stops_at_different_depths():
    """The property above would also hold for a policy that never stops early."""
    texts = [Language(5).truth(key, 4) for key in range(40)]
    policy = OptTree(nodes=8, threshold=0.25, depth=6, width=4)
    cycle = cycle_at(list(range(40)), [0] * 40)
    got = draft(policy, SyntheticDrafter(Language(5), texts), cycle, fresh(policy, cycle))
    assert len(set((got.widths > 0).sum(1).tolist())) >= 3
    assert OptTree() == OptTree(60, 0.5, 10, 10)


# Dynamic Depth Decoding ----------------------------------------------------------------------------------------------


def ddd(token, of, total: int, depth: int, top_k: int, checks: tuple[int, ...], threshold: float, reach: int):
    """Algorithm 1: after the steps in ``checks`` break where log sum exp over the beam is below the threshold."""
    nodes = [Node(token)]
    layer = nodes
    for step in range(depth):
        beam = by_total_order(layer)[:top_k]
        if step in checks:
            probability = sum(math.exp(float(node.score)) for node in beam)
            if not probability or single(math.log(probability)) < single(threshold):
                break
        layer = grow(nodes, inside(beam, reach), of, lambda node: top_k)
        if not layer:
            break
    return nodes, keep_best(nodes, total)


@settings(max_examples=50, deadline=None)
@given(
    LANGUAGES,
    st.integers(1, 30),
    st.integers(1, 5),
    st.integers(1, 5),
    st.lists(st.integers(1, 5), max_size=3).map(tuple),
    st.sampled_from([-1.01, -0.3001, 0.201, 1.01]),  # no sum of the language's probabilities lies so near
    REACHES,
)
def test_ddd(language, total, depth, top_k, checks, threshold, reaches):
    policy = DynamicDepth(total, depth, top_k, checks, threshold)

    def build(token, of, reach):
        return ddd(token, of, total, depth, top_k, checks, threshold, reach)

    compare(policy, language, reaches, build)


def test_ddd_as_published():
    assert DynamicDepth() == DynamicDepth(60, 11, 10, (5, 7, 9), -0.3)
    nobody_stops = DynamicDepth(12, 4, 3, checks=())
    language = Language(3)
    compare(nobody_stops, language, FAR, lambda token, of, reach: brute.eagle3(token, of, 12, 4, 3, reach))


# TALON ---------------------------------------------------------------------------------------------------------------


def talon(token, of, policy: Talon, reach: int):
    """Algorithm 2, in probabilities; a layer's parents are cut to the width before they are expanded."""
    nodes = [Node(token)]
    tree, parents = nodes[:], nodes[:]
    for level in range(policy.depth):
        if len(tree) >= policy.total_tokens:
            break
        branching = policy.branching if level else policy.top_k
        pool = grow(nodes, inside(by_total_order(parents)[: policy.width], reach), of, lambda node, k=branching: k)
        if level and pool:
            anchor = max(math.exp(float(node.score)) for node in pool)
            pool = [node for node in pool if math.exp(float(node.score)) >= policy.mu * anchor]
        parents = by_total_order(pool)[: policy.total_tokens - len(tree)]
        tree += parents
        if not parents:
            break
    return nodes, sorted(tree, key=lambda node: node.index)


@settings(max_examples=60, deadline=None)
@given(
    LANGUAGES,
    st.builds(
        Talon,
        total_tokens=st.integers(1, 40),
        top_k=st.integers(1, 6),
        mu=st.sampled_from([0.03, 0.3, 0.73, 1.0]),
        width=st.integers(1, 8),
        branching=st.integers(1, 6),
        depth=st.integers(1, 6),
    ),
    REACHES,
)
def test_talon(language, policy, reaches):
    compare(policy, language, reaches, lambda token, of, reach: talon(token, of, policy, reach))


def test_talon_shapes_its_tree():
    """Where the draft is sure the tree is deep and narrow, elsewhere shallow and wide; the budget is spent on both."""
    texts = [Language(6, steps=7).truth(key, 4) for key in range(30)]
    policy = Talon(total_tokens=20, top_k=3, mu=0.5, width=20, branching=20, depth=20)
    cycle = cycle_at(list(range(30)), [0] * 30)
    got = draft(policy, SyntheticDrafter(Language(6, steps=7), texts), cycle, fresh(policy, cycle))
    assert set(got.kept.sum(1).tolist()) == {20}
    assert len(set((got.widths > 0).sum(1).tolist())) >= 3


# C2T -----------------------------------------------------------------------------------------------------------------


def c2t(token, of, entropy_of, policy: C2T, reach: int):
    """Algorithm 1 with its second pruning."""

    def logit(node: Node) -> np.float32:
        seen = (math.exp(float(node.score)), entropy_of(node.parent), node.depth, 1.0)
        units = [max(sum(w * x for w, x in zip(unit, seen, strict=True)), 0.0) for unit in policy.units_]
        return single(sum(w * unit for w, unit in zip(policy.output_, [*units, 1.0], strict=True)))

    nodes = [Node(token)]
    tree, layer = nodes[:], nodes[:]
    for _ in range(policy.depth):
        children = grow(nodes, inside(layer, reach), of, lambda node: policy.top_k)
        looked_at = by_total_order(children)[: policy.width]
        passed = [node for node in looked_at if 1 / (1 + math.exp(-float(logit(node)))) >= policy.beta]
        layer = sorted(passed, key=lambda node: -float(logit(node)))[: policy.top_k]  # stable: then by probability
        tree += layer
        if not layer:
            break
    return nodes, sorted(tree, key=lambda node: node.index)


WEIGHTS = st.floats(-2, 2).map(lambda weight: round(weight, 3))


@settings(max_examples=60, deadline=None)
@given(
    LANGUAGES,
    st.lists(st.tuples(WEIGHTS, st.floats(-0.03, 0.03), WEIGHTS, WEIGHTS), min_size=1, max_size=3),
    st.data(),
    st.sampled_from([0.2, 0.4321, 0.7]),
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([2, 4, 25]),
    REACHES,
)
def test_c2t(language, units, data, beta, top_k, depth, width, reaches):
    output = data.draw(st.lists(WEIGHTS, min_size=len(units) + 1, max_size=len(units) + 1))
    if abs(output[-1] - math.log(beta / (1 - beta))) < 1e-3:  # every unit may be off
        output[-1] += 0.01
    policy = C2T(beta, top_k, depth, width, units_=tuple(units), output_=tuple(output))
    row = iter(range(ROWS))

    def build(token, of, reach):
        key = next(row)

        def entropy_of(node: Node) -> float:  # as the synthetic drafter makes it up
            return float(mix(key, key % 4 + node.depth, node.token) % np.uint64(100))

        return c2t(token, of, entropy_of, policy, reach)

    compare(policy, language, reaches, build)


# Sequoia -------------------------------------------------------------------------------------------------------------


def all_trees(nodes: int, depth: int, branches: int) -> list[tuple[tuple[int, ...], ...]]:
    """Every tree of so many nodes (root included) whose children are the first ranks, as paths."""
    if nodes == 1:
        return [()]
    if depth == 0:
        return []
    found = []
    for children in range(1, min(branches, nodes - 1) + 1):
        for sizes in itertools.product(range(1, nodes), repeat=children):
            if sum(sizes) == nodes - 1:
                for parts in itertools.product(*(all_trees(size, depth - 1, branches) for size in sizes)):
                    below = [((rank,), *((rank, *path) for path in part)) for rank, part in enumerate(parts)]
                    found.append(tuple(path for part in below for path in part))
    return found


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=3).filter(sum))
def test_sequoia_finds_the_best_tree(weights):
    rates = np.array(weights) / (sum(weights) + 2)
    value, choice = best_trees(rates, 7, 3)
    for nodes, depth in itertools.product(range(1, 8), range(4)):
        trees = all_trees(nodes, depth, len(rates))
        assert np.isfinite(value[depth, nodes]) == bool(trees)
        if trees:
            best = max(expected_tokens(tuple(rates), tree) for tree in trees)
            assert value[depth, nodes] == pytest.approx(best)
            chosen = paths_of(choice, nodes, depth)
            assert len(chosen) == nodes - 1 and max((len(path) for path in chosen), default=0) <= depth
            assert expected_tokens(tuple(rates), chosen) == pytest.approx(best)
            Static(chosen or ((0,),))  # a proper tree


def test_sequoia_drafts_its_tree():
    tree = ((0,), (1,), (0, 0), (0, 1), (1, 0))
    policy, language = Sequoia(acceptance_=(0.4, 0.3), tree_=tree), Language(4)
    compare(policy, language, FAR, lambda token, of, reach: brute.static(token, of, set(tree), reach))
    compare(Sequoia(acceptance_=(0.0,), tree_=()), language, FAR, lambda token, of, reach: ([Node(token)],) * 2)


# Sums ----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), max_size=20), st.integers(0, 12))
def test_ordered_sum(values, more):
    value = torch.tensor(values, dtype=torch.float64)
    total = float(ordered_sum(value, 20))
    assert total == pytest.approx(math.fsum(values))
    padded = torch.cat([value, torch.zeros(min(more, 20 - len(values)), dtype=torch.float64)])
    rows = padded.repeat(7, 1)
    assert ordered_sum(rows, 20).tolist() == [total] * 7


def test_probability_mass():
    score = torch.log(torch.tensor([[0.5, 0.25, 0.125, 0.0625], [0.25, 0.0, 0.0, 0.0]]))
    assert probability_mass(score, 2).tolist() == [0.75, 0.25]
    assert probability_mass(score, 9).tolist() == [0.9375, 0.25]
    assert probability_mass(score[:, :0], 3).tolist() == [0.0, 0.0]
