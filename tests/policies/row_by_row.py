"""Chains decoded one row and one token at a time, in plain Python: what the policies' arithmetic is compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from policies.contract import Policy
from tests.policies.records import decode
from tests.policies.synthetic import Language, SyntheticDrafter, SyntheticVerifier, mix

LENGTHS = [36, 20, 30]
LANGUAGES = [Language(seed, steps=60, quantum=0.1) for seed in (3, 11)]
"""Many steps, so that the draft's first choice is sometimes sure and sometimes not."""


@dataclass
class Drafted:
    """A chain so far: log-probability and entropy (nats) of each token, in order."""

    logprob: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.logprob)


class Reference:
    """A policy in plain Python, fresh for each text."""

    most = 0

    def start(self, number: int) -> None:
        """A cycle begins; ``number`` cycles are done."""

    def goes_on(self, chain: Drafted) -> bool:
        """Whether to draft one more token, asked from the empty chain on."""
        raise NotImplementedError

    def keeps(self, chain: Drafted) -> int:
        """How many tokens to verify."""
        return len(chain)

    def learn(self, chain: Drafted, kept: int, accepted: int, rejected: bool) -> None:
        """What verification taught: ``rejected`` if a kept token was tested and refused."""


def run(reference: Reference, language: Language, key: int, text: list[int]) -> list[tuple[int, int, int, int]]:
    """(position, drafted, kept, accepted) of every cycle."""
    position, cycles = 0, []
    while position < len(text) - 1:
        reference.start(len(cycles))
        chain, tokens, token = Drafted(), [], text[position]
        while len(chain) < reference.most and reference.goes_on(chain):
            place = position + len(chain)
            chain.entropy.append(float(mix(np.int64(key), np.int64(place), np.int64(token)) % np.uint64(100)))
            token, logprob = language.children_of(key, place, token, 1)[0]
            chain.logprob.append(float(logprob))
            tokens.append(token)
        kept = reference.keeps(chain)
        follows = text[position + 1 :]
        accepted = 0
        while accepted < min(kept, len(follows)) and tokens[accepted] == follows[accepted]:
            accepted += 1
        rejected = accepted < min(kept, len(follows))
        reference.learn(chain, kept, accepted, rejected)
        cycles.append((position, len(chain), kept, accepted))
        position = min(position + accepted + 1, len(text) - 1)
    return cycles


def check(policy: Policy, make_reference: Callable[[], Reference]) -> int:
    """Assert that the policy decodes as the reference does; how many different chain lengths were drafted."""
    lengths = set()
    for language in LANGUAGES:
        texts = [language.truth(key, length) for key, length in enumerate(LENGTHS)]
        for key, text in enumerate(texts):
            log = decode(policy, SyntheticDrafter(language, texts), SyntheticVerifier(texts), LENGTHS, [key])[key]
            got = [(s.position, len(s.decision.nodes) - 1, len(s.decision.kept) - 1, s.accepted) for s in log]
            wanted = run(make_reference(), language, key, text)
            assert got == wanted, f"{policy.spec()}, text {key}"
            lengths |= {drafted for _, drafted, _, _ in wanted}
    return len(lengths)
