"""Why a live cycle differs from its replay: DESIGN's two explanations, and nothing else.

Recorder and live loop batch differently, so float32 numbers differ in their last bits. A differing draft is explained when
the policy, fed the live run's own numbers, reproduces the live decision, and those numbers differ from the recorded ones by
less than the tolerance. A differing acceptance is explained when the target's margin there is below the tolerance.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from policies.children import Children, Only
from policies.contract import Cycle, Policy, State
from policies.drafting import Drafter, chain_found, draft
from policies.order import NONE
from policies.tree import DraftTree
from policies.verification import Kept, pack

TOLERANCE = 1e-4
"""Nats: larger differences between a live and a recorded log-probability are not rounding."""

Path = tuple[int, ...]


@dataclass
class Answer:
    """What a drafter said about one node: the children's tokens and log-probabilities, and the node's entropy."""

    token: list[int]
    logprob: list[float]
    entropy: float


@dataclass
class TapedDrafter:
    """Passes questions on to a drafter of one row and remembers the answers by the node's token path."""

    drafter: Drafter
    answers: dict[Path, Answer] = field(default_factory=dict)

    @property
    def deepest(self) -> int | None:
        return self.drafter.deepest

    def root(self, cycle: Cycle) -> Tensor:
        self.answers.clear()
        return self.drafter.root(cycle)

    def expand(self, tree: DraftTree, nodes: Tensor, branching: int) -> Children:
        children = self.drafter.expand(tree, nodes, branching)
        for place, node in enumerate(nodes[0].tolist()):
            if node >= 0:
                self.answers[path_of(tree, node)] = Answer(
                    children.token[0, place].tolist(),
                    children.logprob[0, place].tolist(),
                    float(children.entropy[0, place]),
                )
        return children

    def chain_found(self) -> Iterator[Only] | None:
        """What a rule behind it has looked up below the root's only child; see `policies.lookup.drafter`."""
        found = chain_found(self.drafter)
        return None if found is None else self._taped(found)

    def _taped(self, found: Iterator[Only]) -> Iterator[Only]:
        path = tuple(self.answers[()].token)
        for answer in found:
            self.answers[path] = Answer([answer.token], [answer.logprob], answer.entropy)
            yield answer
            path = (*path, answer.token)


@dataclass
class EchoDrafter:
    """Repeats taped answers, so that a policy can be asked again with exactly the numbers of the live run."""

    root_token: int
    answers: dict[Path, Answer]
    deepest: int | None

    def root(self, cycle: Cycle) -> Tensor:
        return torch.tensor([self.root_token])

    def expand(self, tree: DraftTree, nodes: Tensor, branching: int) -> Children:
        found = [self.answers.get(path_of(tree, node)) if node >= 0 else None for node in nodes[0].tolist()]
        nothing = Answer([NONE] * branching, [-torch.inf] * branching, -1.0)
        padded = [answer or nothing for answer in found]
        width = max(len(answer.token) for answer in padded)
        token = torch.tensor([[answer.token + [NONE] * (width - len(answer.token)) for answer in padded]])
        logprob = torch.tensor([[answer.logprob + [-torch.inf] * (width - len(answer.logprob)) for answer in padded]])
        entropy = torch.tensor([[answer.entropy for answer in padded]])
        missing = (nodes >= 0) & torch.tensor([[answer is None for answer in found]])
        return Children(token, logprob, entropy, torch.zeros_like(token), missing)


def path_of(tree: DraftTree, node: int) -> Path:
    """Tokens from the root's child down to a node of row 0."""
    path = []
    while node > 0:
        path.append(int(tree.token[0, node]))
        node = int(tree.parent[0, node])
    return tuple(reversed(path))


def same_decision(policy: Policy, cycle: Cycle, state: State, tape: TapedDrafter, kept: Kept, root: int) -> bool:
    """Whether the policy, asked again with the live run's numbers, keeps what the live run kept."""
    again = draft(policy, EchoDrafter(root, tape.answers, tape.deepest), cycle, policy.begin(cycle, state))
    return same_kept(pack(again.tree, again.kept), kept)


def same_kept(one: Kept, other: Kept) -> bool:
    """Whether two packed one-row trees hold the same tokens under the same parents in the same order."""
    count = int(one.count[0]) + 1
    if count != int(other.count[0]) + 1:
        return False
    return bool((one.token[0, :count] == other.token[0, :count]).all() and (one.parent[0, :count] == other.parent[0, :count]).all())


def largest_difference(live: dict[Path, Answer], recorded: dict[Path, Answer]) -> float:
    """Largest gap (nats) between the live and the recorded log-probability of one child, over nodes that both expanded.

    A child that only one side lists has fallen off the other's list; it is compared with the last entry there.
    """
    largest = 0.0
    for path in live.keys() & recorded.keys():
        ours, theirs = live[path], recorded[path]
        width = min(len(ours.token), len(theirs.token))
        one = dict(zip(ours.token[:width], ours.logprob[:width], strict=True))
        two = dict(zip(theirs.token[:width], theirs.logprob[:width], strict=True))
        for token in (one.keys() | two.keys()) - {NONE}:
            gap = abs(one.get(token, min(one.values())) - two.get(token, min(two.values())))
            largest = max(largest, gap)
    return largest
