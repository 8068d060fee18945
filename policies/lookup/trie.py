"""The continuations of several matches as one tree with counts: the part of a suffix tree that lies below a match."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from policies.one_row import alone, integers
from policies.order import NONE
from policies.sums import ordered_sum


class Paths(NamedTuple):
    """S continuations per row, followed D tokens deep.

    Continuations that agree so far share a node; the first of them *leads* it. Depth 0 is the root, which all share.

    token  int64 [B, D + 1, S]  the token at each depth, -1 where a continuation has ended
    group  int64 [B, D + 1, S]  which continuation leads the node that this one has come to, -1 where it has ended
    """

    token: Tensor
    group: Tensor

    def followers(self, weight: Tensor) -> Tensor:
        """Total weight int64 [B, D + 1, S] of the continuations that pass through each node, at its leader's place; 0
        elsewhere. :param weight: int64 [B, S]"""
        passing = weight[:, None, :].expand_as(self.group).masked_fill(self.group < 0, 0)
        return torch.zeros_like(self.group).scatter_add(2, self.group.clamp(min=0), passing)


def follow(behind: Tensor, matched: Tensor) -> Paths:
    """What came behind the matches, as one tree.

    :param behind: int64 [B, D, S] the tokens behind each match, -1 where its text has ended. :param matched: bool [B, S]
    """
    if matched.shape[1] == 1:  # alone, it leads wherever it goes
        token = torch.nn.functional.pad(behind, (0, 0, 1, 0), value=NONE)
        going = matched[:, None] & (token >= 0)
        going[:, 0] = matched
        return Paths(token, going.to(torch.int64) - 1)
    if alone(matched):
        return _follow_one(behind, matched)
    number = torch.arange(matched.shape[1], device=matched.device)
    tokens = [torch.full_like(number, NONE).expand(matched.shape)]
    groups = [torch.zeros_like(matched, dtype=torch.int64).masked_fill(~matched, NONE)]
    for token in behind.unbind(1):
        going = matched & (token >= 0)
        above = groups[-1]
        together = (above[:, :, None] == above[:, None, :]) & (token[:, :, None] == token[:, None, :])
        leader = torch.where(together, number, matched.shape[1]).amin(2)
        tokens.append(token)
        groups.append(leader.masked_fill(~going, NONE))
    return Paths(torch.stack(tokens, 1), torch.stack(groups, 1))


def _follow_one(behind: Tensor, matched: Tensor) -> Paths:
    """The same for a single row in the host's memory."""
    token = [[NONE] * matched.shape[1], *behind[0].tolist()]
    group = [[0 if found else NONE for found in matched[0].tolist()]]
    for level in token[1:]:
        leader: dict[tuple[int, int], int] = {}
        group.append(
            [
                leader.setdefault((above, own), number) if above >= 0 and own >= 0 else NONE
                for number, (above, own) in enumerate(zip(group[-1], level, strict=True))
            ]
        )
    return Paths(integers([token], behind), integers([group], behind))


class Trie(NamedTuple):
    """A tree of continuations. A node's *place* is depth * S + leader; the root's is 0.

    paths   the continuations
    weight  int64 [B, D + 1, S]  each node's count at its place, 0 = no such node; the root's counts all there was to follow
    """

    paths: Paths
    weight: Tensor

    def children(self, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The children of nodes by place int64 [B, W] (-1 = none): (token int64 [B, W, S], -1 = none; share of the node's
        count float64 [B, W, S], 0 = none; place int64 [B, W, S])."""
        rows, levels, width = self.weight.shape
        known = place.clamp(min=0)
        depth, leader = known // width, known % width
        inside = (place >= 0) & (depth < levels - 1)
        below = (depth + 1).clamp(max=levels - 1)

        def level(values: Tensor, at: Tensor) -> Tensor:
            return values.gather(1, at[:, :, None].expand(-1, -1, width))

        count = level(self.weight, below)
        own = self.weight.view(rows, -1).gather(1, known)[:, :, None]
        exists = (level(self.paths.group, depth) == leader[:, :, None]) & (count > 0) & inside[:, :, None]
        share = torch.where(exists, count.to(torch.float64) / own.clamp(min=1), 0.0)
        token = level(self.paths.token, below).masked_fill(~exists, NONE)
        return token, share, below[:, :, None] * width + torch.arange(width, device=place.device)


def rooted(followers: Tensor, total: Tensor) -> Tensor:
    """The same counts with ``total`` int64 [B] at the root."""
    weight = followers.clone()
    weight[:, 0] = 0
    weight[:, 0, 0] = total
    return weight


def entropy(probability: Tensor) -> Tensor:
    """Entropy float32 [B, W] (nats) of proposals float64 [B, W, C] renormalised; 0 where there is none."""
    total = ordered_sum(probability, probability.shape[2])
    weighted = ordered_sum(torch.special.xlogy(probability, probability), probability.shape[2])
    safe = torch.where(total > 0, total, 1.0)
    return (torch.log(safe) - weighted / safe).clamp(min=0.0).to(torch.float32)
