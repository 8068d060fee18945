"""Packing, the acceptance walk and the statuses: by hand, and against a walk over plain lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.drafting import draft
from policies.eagle3 import Eagle3
from policies.errors import UserError
from policies.loop import emitted, gather_rows, run_cycle
from policies.tree import Children, DraftTree
from policies.verification import Walk, node_status, pack, walk
from tests.policies import brute
from tests.policies.synthetic import Language, SyntheticDrafter, SyntheticVerifier, cycle_at, fresh

INF = float("inf")


def hand_tree() -> DraftTree:
    """Two rows. Row 0: root 5 -> {7, 8}, 7 -> {9, 7}; row 1: root 5 -> {8}, nothing more.

    Row 0's nodes: 0 root, 1 = 7, 2 = 8, 3 = 9 below 7, 4 = 7 below 7.
    """
    tree = DraftTree(torch.tensor([5, 5]))

    def children(token, logprob):
        token, logprob = torch.tensor(token), torch.tensor(logprob)
        return Children(token, logprob, torch.zeros(token.shape[:2]), token)

    tree.append(tree.root_nodes(), children([[[7, 8]], [[8, -1]]], [[[-0.5, -1.0]], [[-0.25, -INF]]]))
    tree.append(torch.tensor([[1], [-1]]), children([[[9, 7]], [[-1, -1]]], [[[-0.5, -2.0]], [[-INF, -INF]]]))
    return tree


def test_the_tree():
    tree = hand_tree()
    assert tree.token.tolist() == [[5, 7, 8, 9, 7], [5, 8, -1, -1, -1]]
    assert tree.parent.tolist() == [[-1, 0, 0, 1, 1], [-1, 0, -1, -1, -1]]
    assert tree.score.tolist() == [[0, -0.5, -1, -1, -2.5], [0, -0.25, -INF, -INF, -INF]]
    assert tree.size.tolist() == [5, 2]
    assert tree.frontier(3).tolist() == [[3, 4], [-1, -1]]


def test_keeping_all_of_a_row_is_packed_the_same_beside_one_that_drops_a_node():
    tree = DraftTree(torch.tensor([5, 6]))
    for nodes in (tree.root_nodes(), torch.tensor([[2], [1]])):
        token, logprob = torch.tensor([[[7, 8]], [[9, 7]]]), torch.tensor([[[-0.5, -1.0]], [[-0.25, -2.0]]])
        tree.append(nodes, Children(token, logprob, torch.zeros(2, 1), token))
    everything = torch.ones(2, 5, dtype=torch.bool)
    but_one = everything.clone()
    but_one[1, 4] = False
    for whole, beside in zip(pack(tree, everything), pack(tree, but_one), strict=True):
        assert torch.equal(whole[0], beside[0]) and whole.dtype == beside.dtype
    assert pack(tree, everything).parent.tolist() == [[-1, 0, 0, 2, 2], [-1, 0, 0, 1, 1]]


def test_pack_walk_and_status():
    tree = hand_tree()
    kept = pack(tree, torch.tensor([[True, True, True, False, True], [True, True, False, False, False]]))
    assert kept.node.tolist() == [[0, 1, 2, 4], [0, 1, -1, -1]]
    assert kept.token.tolist() == [[5, 7, 8, 7], [5, 8, -1, -1]]
    assert kept.parent.tolist() == [[-1, 0, 0, 1], [-1, 0, -1, -1]]
    assert kept.depth.tolist() == [[0, 1, 1, 2], [0, 1, -1, -1]]
    assert kept.count.tolist() == [3, 1]
    # row 0: behind the root comes 7, behind 7 comes 7, behind that 3. Row 1: behind the root comes 2.
    outcome = walk(kept, torch.tensor([[7, 7, 0, 3], [2, 0, -1, -1]]))
    assert outcome.path.tolist() == [[1, 3], [-1, -1]]
    assert outcome.accepted.tolist() == [2, 0]
    assert outcome.bonus.tolist() == [3, 2]
    # row 0's node 3 was not kept, row 1's node 1 was tested and rejected
    assert node_status(tree, kept, outcome).tolist() == [[-1, 1, 0, -1, 1], [-1, 0, -1, -1, -1]]


def test_walk_ends_with_the_text():
    tree = hand_tree()
    kept = pack(tree, tree.exists)
    outcome = walk(kept, torch.tensor([[7, -1, 0, 0, 0], [8, -1, -1, -1, -1]]))
    assert outcome.accepted.tolist() == [1, 1]
    assert outcome.bonus.tolist() == [-1, -1]
    # behind the end nothing is tested: the children of node 1 were not rejected
    assert node_status(tree, kept, outcome).tolist() == [[-1, 1, 0, -1, -1], [-1, 1, -1, -1, -1]]
    assert emitted(outcome, torch.tensor([9, 1])).tolist() == [1, 1]
    assert emitted(Walk(outcome.path, outcome.accepted, torch.tensor([4, 4])), torch.tensor([9, 1])).tolist() == [2, 1]


def test_root_alone():
    tree = hand_tree()
    kept = pack(tree, tree.depth == 0)
    outcome = walk(kept, torch.tensor([[7], [8]]))
    assert outcome.accepted.tolist() == [0, 0] and outcome.bonus.tolist() == [7, 8]
    assert node_status(tree, kept, outcome).tolist() == [[-1] * 5] * 2


def test_orphans_are_refused():
    with pytest.raises(UserError, match="ancestor-closed"):
        pack(hand_tree(), torch.tensor([[True, False, False, True, False], [True, False, False, False, False]]), "mine")


@settings(max_examples=40, deadline=None)
@given(
    st.builds(Language, seed=st.integers(0, 10**6), steps=st.integers(2, 5), narrow=st.sampled_from([0, 3])),
    st.integers(1, 30),
    st.integers(1, 5),
    st.integers(1, 12),
)
def test_walk_is_the_walk_over_lists(language, total_tokens, depth, length):
    rows = 6
    texts = [language.truth(key, length) for key in range(rows)]
    position = [key % length for key in range(rows)]
    policy = Eagle3(total_tokens, depth, 4)
    cycle = cycle_at(list(range(rows)), position)
    done = run_cycle(policy, SyntheticDrafter(language, texts), SyntheticVerifier(texts), cycle, {})
    for row in range(rows):

        def children_of(at: int, token: int, branching: int, row: int = row):
            return language.children_of(row, position[row] + at, token, branching)

        nodes, kept = brute.eagle3(texts[row][position[row]], children_of, total_tokens, depth, 4)
        accepted, bonus = brute.walk(kept, texts[row][position[row] + 1 :])
        path = done.walk.path[row][: int(done.walk.accepted[row])]
        assert done.kept.node[row][path].tolist() == [node.index for node in accepted]
        assert int(done.walk.bonus[row]) == bonus
        status = node_status(done.draft.tree, done.kept, done.walk)[row].tolist()
        end = accepted[-1] if accepted else nodes[0]
        for node in nodes[1:]:
            tested = any(node is k for k in kept) and any(node.parent is one for one in [nodes[0], *accepted])
            tested = tested and not (node.parent is end and bonus < 0)
            assert status[node.index] == ((1 if any(node is a for a in accepted) else 0) if tested else -1)


def test_a_row_that_stopped_does_not_start_again():
    """A policy that names nodes in a row whose drafting has ended gets nothing more for it."""

    class Stubborn(Eagle3):
        def expand(self, tree, cycle, state):
            if tree.levels == 3:
                return None
            wish = super().expand(tree, cycle, state) if tree.levels != 1 else None
            if wish is None:  # level 2: row 0 pauses
                wish = super().expand(tree, cycle, state)
                wish = wish._replace(nodes=wish.nodes.clone())
                wish.nodes[0] = -1
            elif tree.levels == 2:
                wish.nodes[0, 0] = 1
            return wish

    language = Language(1)
    cycle = cycle_at([0, 1], [0, 0])
    got = draft(Stubborn(9, 3, 3), SyntheticDrafter(language, [[1, 2], [3, 4]]), cycle, fresh(Eagle3(), cycle))
    assert got.widths.tolist()[0] == [1, 0, 0] and got.widths.tolist()[1] == [1, 3, 3]


def test_state_that_outlives_its_rows_is_not_gathered():
    state = {"average": torch.tensor([0.5])}
    nobody = torch.zeros(0, dtype=torch.int64)
    assert gather_rows(state, nobody, 1, "stream")["average"].tolist() == [0.5]
    assert gather_rows(state, nobody, 1, "batch")["average"].tolist() == [0.5]
    assert gather_rows({"x": torch.tensor([1, 2, 3])}, torch.tensor([2, 0]), 3)["x"].tolist() == [3, 1]
