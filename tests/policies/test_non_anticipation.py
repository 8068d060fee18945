"""No registered policy knows the future, and policies that do are caught."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.chain import Chain
from policies.contract import Expansion
from policies.eagle3 import Eagle3, most_probable
from tests.policies.anticipation import World, anticipates
from tests.policies.cases import make
from tests.policies.cases import settings as specs


@pytest.mark.parametrize("spec", specs())
def test_no_policy_anticipates(spec):
    policy = make(spec)
    alone = policy.scope in ("stream", "batch")  # every text is decoded by itself: fewer do
    assert anticipates(lambda world: policy, rows=4 if alone else 6) == ""


@settings(max_examples=3, deadline=None)
@given(st.integers(10, 10**6))
def test_no_policy_anticipates_elsewhere(seed):
    assert anticipates(lambda world: Eagle3(8, 3, 3), range(seed, seed + 1)) == ""


class Cheater(Eagle3):
    """Keeps a reference to the truth in the object."""

    def __init__(self, world: World):
        object.__setattr__(self, "total_tokens", 8)
        object.__setattr__(self, "depth", 3)
        object.__setattr__(self, "top_k", 3)
        object.__setattr__(self, "world", world)

    def future(self, cycle, ahead: int) -> torch.Tensor:
        """The true token so many places behind each root."""
        texts = self.world.verifier.texts
        return texts[cycle.sequence].gather(1, (cycle.position + ahead).clamp(max=texts.shape[1] - 1)[:, None])[:, 0]


class KeepsTheTruth(Cheater):
    """Verifies only first tokens that will be accepted."""

    def select(self, tree, cycle, state):
        true = (tree.depth == 1) & (tree.token == self.future(cycle, 1)[:, None])
        return most_probable(tree, 7) & ((tree.depth != 1) | true) & (tree.depth <= 1)


class StopsInTime(Cheater):
    """Does not draft where nothing would be accepted."""

    def expand(self, tree, cycle, state):
        wish = super().expand(tree, cycle, state)
        if wish is None or tree.levels == 0:
            return wish
        worth_it = ((tree.depth == 1) & (tree.token == self.future(cycle, 1)[:, None])).any(1)
        return wish._replace(nodes=wish.nodes.masked_fill(~worth_it[:, None], -1))


class LooksFarAhead(Cheater):
    """Sizes its tree by a token four places ahead; the nearer ones do not matter."""

    def select(self, tree, cycle, state):
        return most_probable(tree, 2 + (self.future(cycle, 4) % 3).clamp(min=0))


class PlaysBackTheVerifier(Chain):
    """Remembers between cycles what the verifier would say next."""

    def __init__(self, world: World):
        object.__setattr__(self, "k", 2)
        object.__setattr__(self, "world", world)

    def init(self, rows, key):
        return {"peek": self.world.verifier.texts[key, -2]}  # the text's last token

    def expand(self, tree, cycle, state):
        if tree.levels == self.k:
            return None
        return Expansion(tree.frontier(1).masked_fill((state["peek"] % 2 == 0)[:, None], -1), 1)


@pytest.mark.parametrize("cheater", [KeepsTheTruth, StopsInTime, LooksFarAhead, PlaysBackTheVerifier])
def test_cheaters_are_caught(cheater):
    assert "depend on later tokens" in anticipates(cheater)


def test_the_honest_versions_are_not():
    """The same classes without their peeking: the check does not cry wolf."""
    assert anticipates(lambda world: Eagle3(8, 3, 3)) == ""
    assert anticipates(lambda world: Chain(2)) == ""
