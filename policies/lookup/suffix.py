"""Suffix decoding: count what followed the end of the text wherever it stood before, and weigh long matches against many."""

from __future__ import annotations

import torch
from torch import Tensor

from policies.errors import UserError
from policies.lookup.counted import Counted, Proposal
from policies.lookup.lone_trie import LoneTrie
from policies.lookup.matching import Matches, deepened, own_matches
from policies.lookup.past import Past
from policies.lookup.rule import Candidates, Rule, at_least, rule
from policies.lookup.trie import Paths, Trie, follow, rooted
from policies.one_row import alone
from policies.order import best


@rule("suffix", paper="https://arxiv.org/abs/2411.04975")
class Suffix(Rule):
    """SuffixDecoding (Oliaro et al. 2024) over the sequence's own prompt and output, and over a frozen corpus where one is given,
    by the rule of its implementation in ArcticInference, which vLLM's ``suffix`` method calls.

    For every length of match there is a tree of what followed, in which a node's probability is its count over that of the
    match (the end of the text is an occurrence of itself, with nothing behind it: one match alone gives 1/2). From its root goes a
    path, always to the child that was seen most often, ``factor * length + offset`` tokens long, ``tokens`` at most, none of a
    probability below ``least``; of all lengths, the one whose nodes have the largest sum of probabilities is taken, the shortest of
    equals. The corpus has a tree of its own (in which one match alone gives 1); its proposal is taken instead where that sum is
    larger still.

    depth    tokens of a match and of what follows it, together: the depth of the engines' suffix trees (vLLM: 24)
    tree     propose the as many most probable nodes of the tree, as in the paper, instead of a path, the engines' default
    tokens   most nodes to propose
    factor, offset   nodes to propose = factor * length of the match + offset
    least    path probability below which a node is not proposed
    matches  places to look at: the longest matches, the latest first, in the corpus a sample (ArcticInference counts all)
    corpus   file of a frozen corpus to look into as well
    """

    depth: int = 24
    tree: bool = False
    tokens: int = 24
    factor: float = 1.0
    offset: float = 0.0
    least: float = 0.1
    matches: int = 32
    corpus: str | None = None

    def __post_init__(self):
        at_least(self, 2, "depth")
        at_least(self, 1, "tokens", "matches")
        if not 0 <= self.least <= 1:
            raise UserError(f"drafter 'suffix': least must lie between 0 and 1, not {self.least}")

    def look(self, past: Past) -> Trie | LoneTrie:
        context, last = past.context()
        where = context, last, self.depth - 1, self.matches, self.depth - 1
        likeliest = self._likeliest_of_one if alone(context) else self._likeliest
        found, score = likeliest(own_matches(*where), itself=1)
        frozen = self.frozen_matches(*where)
        if frozen is None:
            return found
        other, other_score = likeliest(frozen, itself=0)
        if isinstance(found, LoneTrie):
            return other if other_score > score else found
        return either(found, other, other_score > score)

    def _likeliest_of_one(self, matches: Matches, itself: int) -> tuple[LoneTrie, float]:
        """:meth:`_likeliest` of a single row in the host's memory."""
        counted = Counted(matches)
        proposal, score = Proposal({}, 0), 0.0
        for long, count in counted.by_length():  # the longest first; among equals the shortest wins
            if (nodes := self._nodes(long)) < 1:
                continue
            propose = counted.tree if self.tree else counted.path
            own = propose(count + itself, self.least, nodes, self.depth - long)
            if own.score >= score:
                proposal, score = own, own.score
        return counted.trie(proposal), score

    def _likeliest(self, matches: Matches, itself: int) -> tuple[Trie, Tensor]:
        """The proposal of the best length of match, and the sum of its path probabilities float64 [B].

        :param itself: 1 where the end of the text is an occurrence of itself.
        """
        length = matches.length
        paths = follow(matches.behind, length > 0)
        weight, score = torch.zeros_like(paths.group), torch.zeros(len(length), dtype=torch.float64, device=length.device)
        for long in range(1, int(length.max()) + 1):
            row = (length >= long).any(1).nonzero()[:, 0]
            if (nodes := self._nodes(long)) < 1 or not len(row):
                continue
            counted = (length[row] >= long).long()
            total = counted.sum(1) + itself
            propose = self._tree if self.tree else self._path
            levels = min(self.depth - long, paths.group.shape[1] - 1)
            own, own_score = propose(Paths(paths.token[row], paths.group[row]), counted, total, nodes, levels)
            better = own_score > score[row]
            weight[row[better]], score[row[better]] = own[better], own_score[better]
        return Trie(paths, weight), score

    def _nodes(self, long: int) -> int:
        """How many nodes a match of this length proposes."""
        return min(self.tokens, int(self.factor * long + self.offset + 1e-6))  # as in the source: 1.4 * 45 is to be 63

    def _tree(self, paths: Paths, counted: Tensor, total: Tensor, nodes: int, levels: int) -> tuple[Tensor, Tensor]:
        """The tree of the counted matches, int64 [B, S] of 0 and 1, cut down to so many nodes on so many levels: (weight as in
        :class:`Trie`, sum of path probabilities float64 [B]). :param total: int64 [B] occurrences, of which a path probability
        is a share."""
        followers = paths.followers(counted)
        followers[:, 0] = 0
        followers[:, levels + 1 :] = 0
        count = followers.masked_fill(~self._likely(followers, total[:, None, None]), 0).flatten(1)
        # a node counts at most as often as its parent, which stands before it: the best are ancestor-closed
        chosen = best(count.to(torch.float32).masked_fill(count == 0, -torch.inf), nodes)
        kept = torch.zeros_like(count).scatter_add(1, chosen.clamp(min=0), (chosen >= 0).long())
        count = count * (kept > 0)
        return rooted(count.view_as(followers), total), count.sum(1).to(torch.float64) / total

    def _path(self, paths: Paths, counted: Tensor, total: Tensor, nodes: int, levels: int) -> tuple[Tensor, Tensor]:
        """The same for the path that goes to the most frequent child, of equal ones the first."""
        count, passing = torch.zeros_like(paths.group), counted
        width = counted.shape[1]
        first = torch.arange(width - 1, -1, -1, device=counted.device)
        for depth in range(1, min(nodes, levels) + 1):
            group = paths.group[:, depth]
            followers = torch.zeros_like(counted).scatter_add(1, group.clamp(min=0), passing.masked_fill(group < 0, 0))
            leader = (followers * width + first).argmax(1, keepdim=True)
            most = followers.gather(1, leader)
            most = most.masked_fill(~self._likely(most, total[:, None]), 0)
            count[:, depth].scatter_(1, leader, most)
            passing = passing * (group == leader) * (most > 0)
        return rooted(count, total), count.flatten(1).sum(1).to(torch.float64) / total

    def _likely(self, count: Tensor, total: Tensor) -> Tensor:
        """Whether nodes seen so often int64 are likely enough, bool."""
        return count.to(torch.float64) >= self.least * total

    def propose(self, found: Trie, place: Tensor, token: Tensor) -> Candidates:
        return Candidates(*found.children(place))


def either(one: Trie, other: Trie, take: Tensor) -> Trie:
    """``other`` in the rows of ``take`` bool [B], ``one`` elsewhere; both of as many continuations."""
    depth = max(one.weight.shape[1], other.weight.shape[1])

    def chosen(ours: Tensor, theirs: Tensor) -> Tensor:
        return torch.where(take[:, None, None], deepened(theirs, depth), deepened(ours, depth))

    paths = Paths(chosen(one.paths.token, other.paths.token), chosen(one.paths.group, other.paths.group))
    return Trie(paths, chosen(one.weight, other.weight).clamp(min=0))
