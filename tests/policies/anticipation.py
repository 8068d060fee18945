"""Non-anticipation: two truths that differ only in the future must meet the same decisions.

:func:`anticipates` is the check; it works on any policy, and tests plant cheaters that it must catch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from policies.contract import Policy
from tests.policies.records import decode
from tests.policies.synthetic import VOCABULARY, Language, SyntheticDrafter, SyntheticVerifier


@dataclass
class World:
    """What a cheater could get hold of."""

    texts: list[list[int]]
    drafter: SyntheticDrafter
    verifier: SyntheticVerifier


def anticipates(make: Callable[[World], Policy], seeds: range = range(3), rows: int = 8, length: int = 24) -> str:
    """Why the policy is a cheater; empty when no decision depended on the future.

    Each sequence is decoded under two truths that agree up to a place and differ in every token behind it. A cycle that
    starts at or before that place knows nothing of what lies behind: its start and its decisions must be the same.

    :param make: builds the policy in a world, so that a cheater can keep a reference to the truth.
    """
    for seed in seeds:
        language = Language(seed, steps=4)
        texts = language.truths(range(rows), length)
        last_common = [(5 * seed + 3 * key) % (length - 6) for key in range(rows)]  # early and late in the texts
        changed = [
            text[: place + 1] + [(token + 1 + seed % 3) % VOCABULARY for token in text[place + 1 :]]
            for text, place in zip(texts, last_common, strict=True)
        ]
        logs = []
        for truth in (texts, changed):
            world = World(truth, SyntheticDrafter(language, truth), SyntheticVerifier(truth))
            policy = make(world)
            alone = policy.scope in ("stream", "batch")  # else one text's future would reach another's past
            groups = [[key] for key in range(rows)] if alone else [list(range(rows))]
            log = {}
            for group in groups:
                log |= decode(policy, world.drafter, world.verifier, [length] * rows, group)
            logs.append(log)
        for key in range(rows):
            place = last_common[key]
            before, after = (  # not the state, which is read after the cycle and has learned from it
                [(step.position, step.decision._replace(state=())) for step in log[key] if step.position <= place]
                for log in logs
            )
            if before != after:
                return f"seed {seed}, sequence {key}: decisions at or before token {place} depend on later tokens"
    return ""
