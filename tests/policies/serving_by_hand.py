"""Serving policies in plain Python, a batch and a step at a time: what their arithmetic is compared with.

A reference plans chains for the requests that still decode, cuts them, and learns from what was accepted. It never sees a
tensor; it knows the drafted log-probabilities, and times from the hand-sized cost model of the other tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from policies.contract import Policy
from tests.policies.records import decode
from tests.policies.synthetic import Language, SyntheticDrafter, SyntheticVerifier

LENGTHS = [40, 22, 30, 37, 12]
LANGUAGES = [Language(seed, steps=60, quantum=0.125) for seed in (3, 11)]
"""Log-probabilities are whole eighths: their sums are exact, so ties are ties here and there."""


@dataclass
class Request:
    """One request in a step: its context, and what was drafted for it."""

    key: int
    context: int
    logprob: list[float] = field(default_factory=list)
    kept: int = 0
    accepted: int = 0
    tested: int = 0

    def survival(self) -> list[float]:
        return [math.exp(sum(self.logprob[: k + 1])) for k in range(len(self.logprob))]


class ServingReference:
    """A policy in plain Python, fresh for each stream of batches."""

    def lengths(self, batch: list[Request]) -> list[int]:
        """How many tokens to draft for each request."""
        raise NotImplementedError

    def cut(self, batch: list[Request]) -> None:
        """Set what each request verifies; all of it by default."""
        for request in batch:
            request.kept = len(request.logprob)

    def learn(self, batch: list[Request]) -> None:
        """What verification taught."""


def step_ms(rows: int, context: int, drafted: int, tokens_each: float) -> float:
    """The cost model ``Priced``, written out: catch-up, draft forwards, verification, commit, overhead."""
    draft = 3.0 + (drafted - 1) * (2.0 + 0.01 * context) if drafted else 0.0
    return draft + 10.0 + 0.5 * tokens_each * rows + 0.25 + 1.0 + 0.125 * drafted


def serve(reference: ServingReference, language: Language, texts: list[list[int]], keys: list[int]) -> dict[int, list]:
    """(position, drafted, kept, accepted) of every cycle of each text of one serving batch."""
    position, log = dict.fromkeys(keys, 0), {key: [] for key in keys}
    while going := sorted(key for key in keys if position[key] < len(texts[key]) - 1):
        batch = [Request(key, position[key] + 5) for key in going]
        drafts = {}
        for request, length in zip(batch, reference.lengths(batch), strict=True):
            token, tokens = texts[request.key][position[request.key]], []
            while len(tokens) < length:
                token, logprob = language.children_of(request.key, position[request.key] + len(tokens), token, 1)[0]
                request.logprob.append(float(logprob))
                tokens.append(token)
            drafts[request.key] = tokens
        reference.cut(batch)
        for request in batch:
            follows, tokens = texts[request.key][position[request.key] + 1 :], drafts[request.key]
            most = min(request.kept, len(follows))
            while request.accepted < most and tokens[request.accepted] == follows[request.accepted]:
                request.accepted += 1
            request.tested = min(request.accepted + 1, most)
            log[request.key].append((position[request.key], len(tokens), request.kept, request.accepted))
            position[request.key] = min(position[request.key] + request.accepted + 1, len(texts[request.key]) - 1)
        reference.learn(batch)
    return log


def check(policy: Policy, make_reference: Callable[[], ServingReference], sizes: tuple[int, ...] = (1, 2, 5)) -> int:
    """Assert that the policy serves as the reference does, at several batch sizes; how many different cycles were seen."""
    seen = set()
    for language in LANGUAGES:
        texts = [language.truth(key, length) for key, length in enumerate(LENGTHS)]
        drafter, verifier = SyntheticDrafter(language, texts), SyntheticVerifier(texts)
        for size in sizes:
            keys = list(range(size))
            wanted = serve(make_reference(), language, texts, keys)
            log = decode(policy, drafter, verifier, LENGTHS, keys[::-1], group=lambda key: 9)
            for key in keys:
                got = [(s.position, len(s.decision.nodes) - 1, len(s.decision.kept) - 1, s.accepted) for s in log[key]]
                assert got == wanted[key], f"{policy.spec()}, batch of {size}, text {key}"
            seen |= {cycle[1:3] for cycles in wanted.values() for cycle in cycles}
    return len(seen)
