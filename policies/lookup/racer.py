"""Retrieval and recent logits together: exact continuations where there are some, the target's own last word elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from policies.errors import UserError
from policies.lookup.matching import last_occurrence
from policies.lookup.past import Past
from policies.lookup.rule import Candidates, Rule, at_least, rule
from policies.lookup.trie import Trie, follow, rooted
from policies.order import NONE


class Found(NamedTuple):
    """The continuations of the longest matches, and where the target's distributions are known: behind columns bool [B, L]."""

    trie: Trie
    past: Past
    context: Tensor
    known: Tensor


@rule("racer", paper="https://arxiv.org/abs/2604.14885")
class Racer(Rule):
    """The idea of RACER (Zhang et al. 2026): a retrieval tree of exact matches joined with a logits tree, which reuses at
    every node the distribution that the target gave behind the last occurrence of the same token ("copy-logit").

    Ours is one distribution per node, not two trees with budgets of their own: where both have something to say, ``retrieval``
    weighs the share of the continuations against the target's probability; where one is silent, the other counts alone. The
    tree has no end of its own: the policy gives it one. Distributions of the prompt are not used (a recording has none).

    longest    longest match to look for, tokens
    shortest   shortest match whose continuations count
    depth      tokens to follow a match
    matches    places to look at, the latest among the longest, own text before the corpus among equals
    top        how many of the target's best tokens to reuse; the recording must hold as many
    retrieval  weight of the continuations where the target has a word as well
    corpus     file of a frozen corpus to look for continuations in as well
    """

    longest: int = 16
    shortest: int = 2
    depth: int = 16
    matches: int = 16
    top: int = 8
    retrieval: float = 0.5
    corpus: str | None = None

    def __post_init__(self):
        at_least(self, 1, "longest", "shortest", "depth", "matches", "top")
        if not 0 <= self.retrieval <= 1:
            raise UserError(f"drafter 'racer': retrieval must lie between 0 and 1, not {self.retrieval}")

    def look(self, past: Past) -> Found:
        context, last = past.context()
        length, behind = self.longest_matches(context, last, self.longest, self.matches, self.depth)
        counted = (length == length[:, :1]) & (length >= self.shortest)
        paths = follow(behind, counted)
        trie = Trie(paths, rooted(paths.followers(counted.long()), counted.sum(1)))
        column = torch.arange(context.shape[1], device=context.device)
        told = (past.told - past.first)[:, None]
        return Found(trie, past, context, (column + 1 >= told) & (column < last[:, None]))

    def propose(self, found: Found, place: Tensor, token: Tensor) -> Candidates:
        seen, share, below = found.trie.children(place)
        said, logprob = found.past.target_top(last_occurrence(found.context, token, found.known), self.top)
        chance = torch.exp(logprob.to(torch.float64))
        both = (share > 0).any(2, keepdim=True) & (chance > 0).any(2, keepdim=True)
        retrieved = torch.where(both, self.retrieval * share, share)
        copied = torch.where(both, (1.0 - self.retrieval) * chance, chance)
        same = (seen[:, :, :, None] == said[:, :, None, :]) & (seen >= 0)[:, :, :, None]
        retrieved = retrieved + torch.where(same, copied[:, :, None, :], 0.0).amax(3)  # a token stands in a list once
        copied = copied.masked_fill(same.any(2), 0.0)
        return Candidates(
            token=torch.cat([seen, said], 2),
            probability=torch.cat([retrieved, copied], 2),
            place=torch.cat([below, torch.full_like(said, NONE)], 2),
        )
