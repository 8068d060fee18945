"""Prompt lookup decoding: copy what followed the last few tokens when they stood in the text before."""

from __future__ import annotations

from torch import Tensor

from policies.errors import UserError
from policies.lookup.lone_trie import LoneTrie, chain
from policies.lookup.matching import longest_match
from policies.lookup.past import Past
from policies.lookup.rule import Candidates, Rule, at_least, rule
from policies.lookup.trie import Trie, follow, rooted
from policies.one_row import alone


@rule("prompt_lookup", paper="https://github.com/apoorvumang/prompt-lookup-decoding")
class PromptLookup(Rule):
    """Find the last ``ngram`` tokens earlier in prompt or output, or else ever fewer of them, and propose what followed.

    Saxena 2023, in Hugging Face ``prompt_lookup_num_tokens``. The proposal is a chain, and certain (log-probability 0).

    ngram   longest run of tokens to look for (Hugging Face: max_matching_ngram_size, there 2)
    least   shortest run that counts: where only fewer tokens are found, nothing is proposed
    tokens  how many to copy
    latest  take the latest of several places; the original takes the earliest
    corpus  file of a frozen corpus, in which a longer match is looked for
    """

    ngram: int = 3
    tokens: int = 10
    latest: bool = False
    corpus: str | None = None
    least: int = 1

    def __post_init__(self):
        at_least(self, 1, "ngram", "tokens", "least")
        if self.least > self.ngram:
            raise UserError(f"drafter 'prompt_lookup': least must not be above ngram, which is {self.ngram}, not {self.least}")

    def look(self, past: Past) -> Trie | LoneTrie:
        context, last = past.context()
        if alone(context):
            return self._look_alone(context, last)
        matches = self.longest_matches(context, last, self.ngram, 1, self.tokens, self.latest)
        found = matches.length >= self.least
        paths = follow(matches.behind, found)
        return Trie(paths, rooted(paths.followers(found.long()), found[:, 0].long()))

    def _look_alone(self, context: Tensor, last: Tensor) -> LoneTrie:
        """The same for a single row in the host's memory."""
        length, tokens = longest_match(context[0].numpy(), self.ngram, self.tokens, self.latest)
        frozen = self.frozen_matches(context, last, self.ngram, 1, self.tokens)
        if frozen is not None and int(frozen.length) > length:  # of equal ones the own text's comes first
            length, tokens = int(frozen.length), frozen.first_continuation()
        return chain(tokens if length >= self.least else [])

    def propose(self, found: Trie, place: Tensor, token: Tensor) -> Candidates:
        return Candidates(*found.children(place))
