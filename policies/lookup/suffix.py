"""Suffix decoding: count what followed the end of the text wherever it stood before, and weigh long matches against many."""

from __future__ import annotations

import torch
from torch import Tensor

from policies.errors import UserError
from policies.lookup.matching import best_matches, match_lengths
from policies.lookup.past import Past
from policies.lookup.rule import Candidates, Rule, at_least, rule
from policies.lookup.trie import Paths, Trie, follow, rooted
from policies.order import best


@rule("suffix", paper="https://arxiv.org/abs/2411.04975")
class Suffix(Rule):
    """SuffixDecoding (Oliaro et al. 2024) over the sequence's own prompt and output, by the rule of its implementation in
    ArcticInference.

    For every length of match there is a tree of what followed, in which a node's probability is its count over that of the
    match (the end of the text is an occurrence of itself, with nothing behind it: one match alone gives 1/2). The
    ``factor * length + offset`` most probable nodes are proposed, ``tokens`` at most, none below ``least``; of all lengths,
    the one whose nodes have the largest sum of probabilities is taken, the longest of equals.

    longest  longest match to look for, tokens
    depth    tokens to follow a match
    tokens   most nodes to propose
    factor, offset   nodes to propose = factor * length of the match + offset
    least    path probability below which a node is not proposed
    matches  places to look at: the longest matches, the latest first (ArcticInference counts all)
    """

    longest: int = 24
    depth: int = 24
    tokens: int = 24
    factor: float = 1.0
    offset: float = 0.0
    least: float = 0.1
    matches: int = 32

    def __post_init__(self):
        at_least(self, 1, "longest", "depth", "tokens", "matches")
        if not 0 <= self.least <= 1:
            raise UserError(f"drafter 'suffix': least must lie between 0 and 1, not {self.least}")

    def look(self, past: Past) -> Trie:
        context, last = past.context()
        match, length = best_matches(match_lengths(context, last, self.longest), self.matches)
        paths = follow(context, last, match, self.depth)
        weight, score = torch.zeros_like(paths.group), torch.zeros(len(last), dtype=torch.float64, device=last.device)
        for long in range(1, int(length.max()) + 1):
            row = (length == long).any(1).nonzero()[:, 0]  # elsewhere a longer match counts the same places
            nodes = min(self.tokens, int(self.factor * long + self.offset))
            if nodes < 1 or not len(row):
                continue
            counted = (length[row] >= long).long()
            own, own_score = self._proposal(Paths(paths.token[row], paths.group[row]), counted, nodes)
            better = own_score >= score[row]
            weight[row[better]], score[row[better]] = own[better], own_score[better]
        return Trie(paths, weight)

    def _proposal(self, paths: Paths, counted: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
        """The tree of the counted matches, int64 [B, S] of 0 and 1, cut down to so many nodes: (weight as in :class:`Trie`,
        sum of path probabilities float64 [B])."""
        total = counted.sum(1) + 1
        followers = paths.followers(counted)
        followers[:, 0] = 0
        likely = followers.to(torch.float64) >= self.least * total[:, None, None]
        count = followers.masked_fill(~likely, 0).flatten(1)
        # a node counts at most as often as its parent, which stands before it: the best are ancestor-closed
        chosen = best(count.to(torch.float32).masked_fill(count == 0, -torch.inf), nodes)
        kept = torch.zeros_like(count).scatter_add(1, chosen.clamp(min=0), (chosen >= 0).long())
        count = count * (kept > 0)
        return rooted(count.view_as(followers), total), count.sum(1).to(torch.float64) / total

    def propose(self, found: Trie, place: Tensor, token: Tensor) -> Candidates:
        return Candidates(*found.children(place))
