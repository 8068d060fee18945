"""Choose a policy's parameters by predicted time: try its variants on the training texts until none is faster.

A climb, not a grid: `Policy.variants` names the neighbours of a setting, each is replayed and priced, and the fastest is the
next setting. Only full coverage competes: what the recording does not hold would be a guess.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from policies.contract import Policy
from sim.setting import Setting
from sim.trial import Trials
from traces.costs import CostModel
from traces.recording import Recording

LEAST_STEP = 1e-3
"""Relative gain below which the climb ends."""
MOST_ROUNDS = 30


def tune(
    policy: Policy,
    recording: Recording,
    drafter: str,
    sequences: np.ndarray,
    cost: CostModel,
    on_replay: Callable[[int], Any] = lambda count: None,
) -> tuple[Policy, float]:
    """The fastest setting that the climb meets, and its predicted ms per token (mean over domains) on ``sequences``.

    :param on_replay: told how many replays have been made, for progress.
    """
    trials = Trials(recording, Setting(drafter), cost, torch.as_tensor(sequences))
    known: dict[Policy, float] = {}

    def time_of(one: Policy) -> float:
        if one not in known:
            (known[one],) = trials.ms_per_token([one])
            on_replay(len(known))
        return known[one]

    best, least = policy, time_of(policy)
    for _ in range(MOST_ROUNDS):
        variants = best.variants(least)
        if not variants:
            break
        fastest = min(variants, key=time_of)
        if not time_of(fastest) < least * (1 - LEAST_STEP):
            break
        best, least = fastest, time_of(fastest)
    return best, least
