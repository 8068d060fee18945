"""Prompt lookup decoding: copy what followed the last few tokens when they stood in the text before."""

from __future__ import annotations

from torch import Tensor

from policies.lookup.matching import best_matches, match_lengths
from policies.lookup.past import Past
from policies.lookup.rule import Candidates, Rule, at_least, rule
from policies.lookup.trie import Trie, follow, rooted


@rule("prompt_lookup", paper="https://github.com/apoorvumang/prompt-lookup-decoding")
class PromptLookup(Rule):
    """Find the last ``ngram`` tokens earlier in prompt or output, or else ever fewer of them, and propose what followed.

    Saxena 2023, in Hugging Face ``prompt_lookup_num_tokens``. The proposal is a chain, and certain (log-probability 0).

    ngram   longest run of tokens to look for (Hugging Face: max_matching_ngram_size, there 2)
    tokens  how many to copy
    latest  take the latest of several places; the original takes the earliest
    """

    ngram: int = 3
    tokens: int = 10
    latest: bool = False

    def __post_init__(self):
        at_least(self, 1, "ngram", "tokens")

    def look(self, past: Past) -> Trie:
        context, last = past.context()
        match, _ = best_matches(match_lengths(context, last, self.ngram), 1, self.latest)
        paths = follow(context, last, match, self.tokens)
        found = (match[:, 0] >= 0).long()
        return Trie(paths, rooted(paths.followers(found[:, None]), found))

    def propose(self, found: Trie, place: Tensor, token: Tensor) -> Candidates:
        return Candidates(*found.children(place))
