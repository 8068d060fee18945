"""Where the true path stands: the rank of its nodes among all that are drafted, after every draft level at once.

A policy that verifies the N most probable nodes of its tree accepts the nodes of the true path whose rank is below N. So one deep
draft tells what every smaller tree would get: each depth is a prefix of it, each N a cut through the ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from policies.children import Children, StoredChildren, lacking
from policies.contract import Cycle, Policy, State
from policies.drafting import Drafter, draft
from policies.order import NONE
from policies.tree import DraftTree
from sim.recorded import RecordedText

NO_TOKEN = -2
"""Behind the recorded truth: equal to no child's token, not even to that of a child which is not there."""


class Standing(NamedTuple):
    """What B trees hold after each of L draft levels.

    rank       int32 [B, L, L]  [b, a, l]: nodes ahead of the true path's node of depth a + 1 after l + 1 levels, in the total
                                order of scores; FAR where the path has no such node, or none yet
    ranked     int32 [B, L]     nodes that have a rank: those of finite score
    drafted    int32 [B, L]     nodes, root not counted
    widths     int64 [B, L]     frontier width of each draft forward
    looked_up  int64 [B]        levels that were answered without one
    missing    int64 [B, L]     expansions wanted so far that the recording does not hold
    """

    rank: Tensor
    ranked: Tensor
    drafted: Tensor
    widths: Tensor
    looked_up: Tensor
    missing: Tensor

    @property
    def levels(self) -> int:
        return self.widths.shape[1]


FAR = torch.iinfo(torch.int32).max


def standing(policy: Policy, drafter: Drafter, cycle: Cycle, text: RecordedText) -> Standing:
    """Draft the policy's tree of every row, and look where the recorded truth stands in it.

    :param policy: whose nodes stand in the order of their scores, those of a level behind those of the levels before.
    """
    along = _Along(drafter, cycle, text)
    drafted = draft(_Everything(policy), along, cycle, policy.begin(cycle, policy.init(len(cycle.sequence), cycle.sequence)))
    levels = drafted.widths.shape[1]
    rows = len(cycle.sequence)
    if not levels:
        none = torch.zeros((rows, 0), dtype=torch.int64)
        return Standing(torch.zeros((rows, 0, 0), dtype=torch.int32), none.int(), none.int(), none, drafted.looked_up, none)
    size = torch.stack([*along.size[1:], drafted.tree.size], dim=1)
    return Standing(
        _ranks(along.score, along.own),
        torch.stack([(score > -torch.inf).sum(1) for score in along.score], dim=1).cumsum(1).int(),
        (size - 1).int(),
        drafted.widths,
        drafted.looked_up,
        torch.stack(along.missing, dim=1).cumsum(1),
    )


class _Everything(Policy):
    """Drafts as another policy does; nothing has to be chosen, since only ranks are asked for."""

    def __init__(self, policy: Policy):
        self.policy, self.needs = policy, policy.needs

    def expand(self, tree: DraftTree, cycle: Cycle, state: State):
        return self.policy.expand(tree, cycle, state)

    def select(self, tree: DraftTree, cycle: Cycle, state: State) -> Tensor:
        return tree.exists


class _Along:
    """A drafter that follows the true path through what it answers.

    score    per level float32 [B, M]: path log-probability of each child that was asked for, -inf where there is none
    own      per level int64 [B]: which of them is the true path's, -1 = none
    size     per level int64 [B]: nodes before it
    missing  per level int64 [B]
    """

    def __init__(self, drafter: Drafter, cycle: Cycle, text: RecordedText):
        self.drafter, self.cycle, self.text, self.deepest = drafter, cycle, text, drafter.deepest
        self.score: list[Tensor] = []
        self.own: list[Tensor] = []
        self.size: list[Tensor] = []
        self.missing: list[Tensor] = []

    def root(self, cycle: Cycle) -> Tensor:
        return self.drafter.root(cycle)

    def expand(self, tree: DraftTree, nodes: Tensor, branching: int) -> Children | StoredChildren:
        children = self.drafter.expand(tree, nodes, branching)
        logprob = children.logprob[:, :, :branching]
        self.score.append((tree.at("score", nodes)[:, :, None] + logprob).flatten(1))
        self.size.append(tree.size)
        missing = lacking(children, nodes, branching)
        self.missing.append(torch.zeros_like(tree.size) if missing is None else missing.sum(1))
        here = (nodes == 0) if tree.levels == 0 else (nodes >= 0) & (tree.at("handle", nodes) == self.handle)
        place = here.to(torch.int8).argmax(1)[:, None]
        token, handle = _family(children, place, logprob.shape[2])
        hit = here.any(1, keepdim=True) & (token == self._truth(tree.levels + 1))
        rank = hit.to(torch.int8).argmax(1)[:, None]
        found = hit.any(1, keepdim=True)
        self.handle = handle.gather(1, rank).masked_fill(~found, NO_TOKEN)
        self.own.append((place * logprob.shape[2] + rank).masked_fill(~found, NONE)[:, 0])
        return children

    def _truth(self, depth: int) -> Tensor:
        """The target's own token int64 [B, 1] so many tokens behind the root."""
        behind = self.text.at(self.cycle) + depth
        inside = behind < self.text.offset[self.cycle.sequence + 1]
        token = self.text.token[behind.clamp(max=len(self.text.token) - 1)].to(torch.int64)
        return token.masked_fill(~inside, NO_TOKEN)[:, None]


def _family(children: Children | StoredChildren, place: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Tokens and handles int64 [B, K] of the children of one expanded node per row, at ``place`` int64 [B, 1] of the frontier."""
    if not isinstance(children, StoredChildren):
        index = place[:, :, None].expand(-1, -1, count)
        return children.token.gather(1, index)[:, 0], children.handle.gather(1, index)[:, 0]
    row = children.row.gather(1, place)
    handle = row * children.table.fanout + torch.arange(count)
    return children.table.tokens(handle).masked_fill(row < 0, NONE), handle


def _ranks(scores: list[Tensor], owns: list[Tensor]) -> Tensor:
    """:attr:`Standing.rank`. Ties go to the lower index, that is to the earlier level and, within one, to the earlier place."""
    levels, rows = len(scores), len(owns[0])
    width = max(score.shape[1] for score in scores)
    pad = torch.nn.functional.pad
    score = torch.stack([pad(one, (0, width - one.shape[1]), value=-torch.inf) for one in scores], dim=1)
    rank = torch.full((rows, levels, levels), FAR, dtype=torch.int32)
    column = torch.arange(width)
    for level, own in enumerate(owns):
        alive = (own >= 0).nonzero()[:, 0]
        if not len(alive):
            break
        place = own[alive][:, None]
        theirs = score[alive]  # [n, L, M]
        mine = theirs[:, level].gather(1, place)[:, :, None]
        ahead = torch.empty_like(theirs)  # 1.0 where a node is ahead: whole numbers, added up exactly in any order
        torch.ge(theirs[:, :level], mine, out=ahead[:, :level])
        torch.gt(theirs[:, level:], mine, out=ahead[:, level:])
        ahead[:, level] += (theirs[:, level] == mine[:, 0]) & (column < place)
        count = ahead.sum(2).cumsum(1).to(torch.int32)
        count[:, :level] = FAR  # not drafted yet
        own_finite = mine[:, 0] > -torch.inf  # what has no probability is never chosen
        rank[alive, level] = count.masked_fill(~own_finite, FAR)
    return rank
