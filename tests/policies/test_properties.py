"""What must hold for every registered policy: closure, order, budget, determinism, no influence of the batch."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from policies.contract import Policy
from policies.drafting import draft
from tests.policies.cases import make, settings
from tests.policies.records import decide, decode, priced
from tests.policies.synthetic import Language, SyntheticDrafter, SyntheticVerifier, cycle_at, fresh

SPECS = settings()
KEYS = 64
LEVEL_BY_LEVEL = {"eagle3", "heterospec", "goodput", "chain", "static", "opt_tree", "ddd", "talon", "dyspec", "c2t", "sequoia"}
"""Policies whose trees grow level by level."""
LANGUAGES = st.builds(
    Language,
    seed=st.integers(0, 10**6),
    steps=st.integers(1, 7),
    holes=st.sampled_from([0, 5]),
    narrow=st.sampled_from([0, 4]),
)
few = hypothesis_settings(max_examples=5, deadline=None)


def world(language: Language, **options) -> SyntheticDrafter:
    return SyntheticDrafter(language, language.truths(range(KEYS), 3), **options)


def rows_of(chosen: list[int], seed: int) -> tuple[list[int], list[int]]:
    """Each key has its own place and reach, so trees of different sizes stand side by side and some stop early."""
    source = [random.Random(f"{seed}/{key}") for key in chosen]
    return [draw.randrange(3) for draw in source], [draw.choice([10**6, 10**6, 0, 2, 3]) for draw in source]


@pytest.mark.parametrize("spec", SPECS)
@few
@given(language=LANGUAGES)
def test_trees_are_well_formed(spec, language):
    policy = make(spec)
    position, reach = rows_of(list(range(7)), language.seed)
    cycle = priced(policy, cycle_at(list(range(7)), position, reach))
    got = draft(policy, world(language), cycle, fresh(policy, cycle))
    tree = got.tree
    for row in range(7):
        size = int(tree.size[row])
        depth, parent, rank = (column[row, :size].tolist() for column in (tree.depth, tree.parent, tree.rank))
        score, kept = tree.score[row, :size].tolist(), set(got.kept[row].nonzero()[:, 0].tolist())
        assert 0 in kept, "the root is verified"
        assert all(parent[node] in kept for node in kept if node), "ancestor-closed"
        assert all(parent[node] < node for node in range(1, size))
        assert max(depth) <= max(reach[row], 0), "drafted beyond the context"
        assert len({(parent[node], rank[node]) for node in range(size)}) == size, "a node was expanded twice"
        assert all(bool(tree.expanded[row, parent[node]]) for node in range(1, size))
        frontier = list(dict.fromkeys(parent[1:]))  # parents in the order of their children
        level_of: dict[int, list[int]] = {}
        for node in frontier:
            level_of.setdefault(depth[node], []).append(node)
        if policy.name in LEVEL_BY_LEVEL:
            assert depth == sorted(depth)
            for nodes in level_of.values():
                assert nodes == sorted(nodes, key=lambda node: (-score[node], node)), "frontier order"
        assert int((got.widths[row] > 0).sum()) <= tree.levels
    budget = getattr(policy, "total_tokens", None)
    if policy.name == "eagle3":
        assert int(got.kept.sum(1).max()) <= budget
    if policy.name == "heterospec":
        assert int(got.kept.sum(1).max()) <= max(policy.verified_tokens())
    if policy.name in ("ddd", "talon", "sequoia"):
        assert int(got.kept.sum(1).max()) <= budget
    if policy.name in ("opt_tree", "dyspec"):  # the root comes on top
        assert int(got.kept.sum(1).max()) <= policy.nodes + 1


@pytest.mark.parametrize("spec", SPECS)
@few
@given(language=LANGUAGES, shuffle=st.randoms(use_true_random=False))
def test_decisions_do_not_depend_on_the_batch(spec, language, shuffle):
    """Bits of every row: alone, among others, permuted, beside rows that do not decode."""
    policy, drafter = make(spec), world(language)

    def decide_rows(chosen: list[int], active: list[bool] | None = None) -> list:
        position, reach = rows_of(chosen, language.seed)
        return decide(policy, drafter, cycle_at(chosen, position, reach, active))

    whole = decide_rows(list(range(KEYS)))
    assert decide_rows(list(range(KEYS))) == whole, "not deterministic"
    for count in (1, 1, 2, 7):
        chosen = shuffle.sample(range(KEYS), count)
        assert decide_rows(chosen) == [whole[key] for key in chosen]
    permuted = shuffle.sample(range(KEYS), KEYS)
    assert decide_rows(permuted) == [whole[key] for key in permuted]
    active = [shuffle.random() < 0.5 for _ in range(7)]
    got = decide_rows(list(range(7)), active)
    assert [got[row] for row in range(7) if active[row]] == [whole[row] for row in range(7) if active[row]]
    assert all(got[row].kept == (0,) and len(got[row].nodes) == 1 for row in range(7) if not active[row])


@pytest.mark.parametrize("spec", [spec for spec in SPECS if make(spec).scope in ("cycle", "sequence")])
def test_whole_texts_do_not_depend_on_the_batch(spec):
    """The same over many cycles, with the state that a policy carries from one to the next (not across requests)."""
    policy = make(spec)
    language = Language(5, steps=5)
    lengths = [12, 25, 7, 18, 1, 30, 9]
    texts = [language.truth(key, length) for key, length in enumerate(lengths)]
    drafter, verifier = SyntheticDrafter(language, texts), SyntheticVerifier(texts)
    together = decode(policy, drafter, verifier, lengths, list(range(7)))
    for alone in range(7):
        assert decode(policy, drafter, verifier, lengths, [alone]) == {alone: together[alone]}
    backwards = decode(policy, drafter, verifier, lengths, list(range(6, -1, -1)))
    assert backwards == together


@pytest.mark.parametrize("spec", SPECS)
@few
@given(language=LANGUAGES)
def test_a_wide_recording_is_not_seen(spec, language):
    """A drafter that returns all its children decides as one that returns what was asked for."""
    policy = make(spec)
    position, reach = rows_of(list(range(7)), language.seed)
    cycle = cycle_at(list(range(7)), position, reach)
    assert decide(policy, world(language, wide=True), cycle) == decide(policy, world(language), cycle)


class Curious(Policy):
    """Reads a column it did not ask for."""

    name = "curious"

    def expand(self, tree, cycle, state):
        return tree.entropy

    def select(self, tree, cycle, state):
        return tree.exists


def test_columns_must_be_asked_for():
    cycle = cycle_at([0], [0])
    with pytest.raises(AttributeError, match="needs"):
        draft(Curious(), world(Language()), cycle, {})


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.startswith("heterospec")])
def test_heterospec_without_treatment_is_eagle3(spec):
    policy = make(spec)
    plain = make(f"eagle3(total_tokens={policy.total_tokens}, depth={policy.depth}, top_k={policy.top_k})")
    language = Language(9)
    cycle = cycle_at(list(range(KEYS)), [0] * KEYS)
    wanted = [one._replace(state=()) for one in decide(plain, world(language), cycle)]
    idle = dataclasses.replace(policy, extend=False, prune=False)
    for same in (dataclasses.replace(policy, thresholds_=()), idle):
        assert [one._replace(state=()) for one in decide(same, world(language), cycle)] == wanted
    cycle = cycle_at([0, 1], [0, 0])
    state = fresh(policy, cycle)
    assert torch.equal(state["stratum"], torch.full((2,), len(policy.thresholds_)))
