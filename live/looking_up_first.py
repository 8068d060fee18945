"""A training-free rule before a draft network in live decoding; and whose drafts a decoder takes, whatever they are."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from live.drafter import LiveDrafter
from live.looking_up import LiveLookup
from live.network import DraftNetwork
from policies.lookup.first import LookupFirst
from policies.lookup.rule import Rule


class RuleFirst(NamedTuple):
    """A rule, and the network that drafts where the rule finds nothing."""

    rule: Rule
    network: DraftNetwork

    @property
    def needs_features(self) -> bool:
        return self.network.needs_features


Drafts = DraftNetwork | Rule | RuleFirst
"""Who may draft."""


class LiveLookupFirst(LookupFirst):
    """The same drafter that replay runs; both of its parts follow the texts as they grow."""

    lookup: LiveLookup
    network: LiveDrafter

    def __init__(self, drafts: RuleFirst):
        super().__init__(LiveLookup(drafts.rule), LiveDrafter(drafts.network))

    @property
    def top(self) -> int:
        return self.lookup.top

    def prefill(self, prompt: Tensor, counts: Tensor, features: Tensor | None, root: Tensor) -> None:
        """Begin with prompts; see the parts for shapes."""
        self.lookup.prefill(prompt, counts, features, root)
        self.network.prefill(prompt, counts, features, root)

    def hear(self, tokens: Tensor, logprobs: Tensor) -> None:
        self.lookup.hear(tokens, logprobs)

    def recall(self, tokens: Tensor, logprobs: Tensor) -> None:
        self.lookup.recall(tokens, logprobs)

    def commit(self, tokens: Tensor, features: Tensor | None, counts: Tensor) -> None:
        """The newly committed tokens; the network catches up on them when it next drafts."""
        self.lookup.commit(tokens, features, counts)
        self.network.commit(tokens, features, counts)

    def gather_rows(self, rows: Tensor) -> None:
        self.lookup.gather_rows(rows)
        self.network.gather_rows(rows)

    def join(self, other: LiveLookupFirst) -> None:
        """The rows of ``other`` behind our own."""
        self.lookup.join(other.lookup)
        self.network.join(other.network)

    def beside(self) -> RuleFirst:
        return RuleFirst(self.lookup.beside(), self.network.beside())

    def forget(self) -> None:
        self.network.forget()

    def forwards(self) -> list[tuple[object, str]]:
        return self.lookup.forwards() + self.network.forwards()


LiveAny = LiveDrafter | LiveLookup | LiveLookupFirst
"""A drafter in live decoding."""


def live_drafter(drafts: Drafts) -> LiveAny:
    """What asks them, for one decoder."""
    if isinstance(drafts, RuleFirst):
        return LiveLookupFirst(drafts)
    return LiveLookup(drafts) if isinstance(drafts, Rule) else LiveDrafter(drafts)
