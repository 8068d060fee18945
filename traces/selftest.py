"""A look at the first recorded texts: do the drafters draft for this target at all?

The commonest failure of a draft head is silent: wrong layer ids, features of the wrong place, a wrong norm. Everything runs,
texts are right, and acceptance falls, in reports from the field from 45% to 10% or to 1% of level-1 drafts. So the recorder says
when a drafter's best guess at level 1 is hardly better than guesses made for other places. What costs only a few points, as one
layer off may where neighbouring layers are alike, cannot be seen here: compare the layers printed at loading with the head's card.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SKILL = 0.25
"""Least share of what chance leaves that a sound drafter gets right; published heads reach 0.5 to 0.8."""
ENOUGH = 32
"""Fewer positions than this say nothing."""
_CURES = {
    "eagle3": "check the layers printed at loading (one off is common; --draft 'HEAD(layers=[...])' overrides), "
    "norm_before_residual, and that it was trained for this very target",
    "eagle": "check that it was trained for this very target (EAGLE-1 heads end in the target's own output layer)",
    "medusa": "check that they were trained for this very target, and that they are counted from the nearest",
    "dflash": "check the layers printed at loading, and that it was trained for this very target, with thinking as here on or off",
    "lm": "check that it was trained with this tokenizer and loads without warnings",
}


def level_one(positions: Mapping[str, np.ndarray], nodes: Mapping[str, np.ndarray], drafter: int) -> tuple[int, float, float]:
    """(positions looked at, share of them where the drafter's best guess is the target's token, the same by chance).

    :param positions: columns of the positions table: sequence, position, token.   :param nodes: of the nodes table.
    By chance: the guesses are held against the tokens of other places, which keeps how often each token occurs.
    """
    if not nodes:
        return 0, 0.0, 0.0
    root = (nodes["drafter"] == drafter) & (nodes["parent"] < 0)
    place = {pair: row for row, pair in enumerate(zip(positions["sequence"].tolist(), positions["position"].tolist(), strict=True))}
    at = zip(nodes["sequence"][root].tolist(), nodes["position"][root].tolist(), strict=True)
    behind = np.array([place.get((sequence, position + 1), -1) for sequence, position in at], dtype=np.int64)
    guess, truth = nodes["child_tokens"][root][behind >= 0, 0], positions["token"][behind[behind >= 0]]
    count = len(truth)
    if count < 2:
        return count, 0.0, 0.0
    shifts = np.unique(np.linspace(1, count - 1, 64).astype(np.int64))
    chance = np.mean([(guess == np.roll(truth, shift)).mean() for shift in shifts])
    return count, float((guess == truth).mean()), float(chance)


def warn_near_chance(
    positions: Mapping[str, np.ndarray], nodes: Mapping[str, np.ndarray], drafters: Sequence[Mapping[str, Any]]
) -> None:
    """Warn on stderr of every drafter whose level-1 acceptance is near chance; ``drafters`` as in the manifest."""
    for index, drafter in enumerate(drafters):
        count, right, chance = level_one(positions, nodes, index)
        if count >= ENOUGH and chance < 0.9 and right - chance < SKILL * (1 - chance):
            print(
                f"warning: {drafter['name']} drafts {right:.0%} of the next tokens right, chance is {chance:.0%} "
                f"({count} positions): {_CURES.get(drafter['kind'], 'check that it was made for this target')}",
                file=sys.stderr,
            )
