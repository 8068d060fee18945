"""Pipelined execution: the draft works on the next cycle while the target verifies this one.

A composition rule over the parts of replayed cycles, after SPEED (arXiv 2310.12072) and PEARL's post-verify (arXiv
2408.11850). While cycle i is verified, the draft bets that its whole depth will be accepted along the draft's first
choices, and that the target's next token is the draft's first choice too; it drafts cycle i + 1 from there.

    bet won    cycle i + 1 has only to wait for what is left of its drafting:  max(0, draft(i + 1) - verify(i))
    bet lost   the head start is thrown away, and drafting begins anew:        draft(i + 1)

Verification, commit and overhead are paid as ever; target and draft are taken to run side by side without slowing each
other down, on hardware of their own. Drafts of a language model and training-free ones depend on committed tokens alone,
so a bet that is won leads to the very draft that was recorded: for them the rule is exact. An EAGLE head would have to
bet on features of its own making instead of the target's, and draft a little differently: for it this is an estimate
(`sim.setting.EXACT_KINDS`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from policies.errors import UserError
from sim.looked_up import asked_of
from sim.pricing import price_parts
from sim.recorded import tensor
from sim.replay import CycleLog
from traces.costs import CostModel
from traces.recording import Recording


def pipelined_price(log: CycleLog, cost: CostModel, recording: Recording, run: Tensor) -> Tensor:
    """Predicted milliseconds of every cycle, float64 [C], batch 1; never more than :func:`sim.pricing.price`.

    :param run: int64 [P] from :func:`first_choice_runs`.
    """
    parts = price_parts(log, cost)
    drafting = parts["catch_up"] + parts["draft"]
    ahead = won_bets(log, run, tensor(recording.offset))
    verified_before = torch.nn.functional.pad(parts["verify"], (1, 0))[:-1]
    drafting = torch.where(ahead, (drafting - verified_before).clamp(min=0.0), drafting)
    return drafting + parts["verify"] + parts["commit"] + parts["overhead"]


def won_bets(log: CycleLog, run: Tensor, offset: Tensor) -> Tensor:
    """bool [C]: the cycle was drafted while the one before it in its text was verified.

    :param run: int64 [P] from :func:`first_choice_runs`.   :param offset: int64 [S + 1] of the recording.
    """
    at = offset[log.sequence] + log.position
    won = (log.levels > 0) & (log.accepted == log.levels) & (run[at] > log.accepted)
    follows = torch.zeros_like(won)
    follows[1:] = log.sequence[1:] == log.sequence[:-1]
    return follows & torch.nn.functional.pad(won, (1, 0))[:-1]


def first_choice_runs(recording: Recording, drafter: str) -> Tensor:
    """For how many tokens behind each position the draft's first choice is the target's token, int64 [P].

    Counted as far as the recording follows the true path, and 0 where it holds no draft.

    :raises UserError: for a drafter that looks tokens up: what it would have proposed behind each position is not known; and for
        Medusa heads and DFlash drafters, which draft from what verification gives.
    """
    if recording.deepest(drafter) is not None:
        raise UserError(
            f"pipelined execution is not priced for {drafter}: it reads the target's state at the last verified token, and drafts "
            "nothing while that is verified; give --execution serial"
        )
    if asked_of(recording, drafter).rule is not None:
        raise UserError(
            f"pipelined execution is not priced for {drafter}, which looks tokens up: give --execution serial, or name a recorded "
            "drafter"
        )
    forest = recording.forest(drafter)
    row = np.flatnonzero(forest.on_path_row >= 0)
    position, depth = forest.position[row], forest.depth[row].astype(np.int64)
    behind = position + depth + 1
    end = recording.offset[np.searchsorted(recording.offset, position, side="right")]
    inside = behind < end
    truth = recording.token[np.minimum(behind, len(recording.token) - 1)]
    hit = inside & (forest.child_token[row, 0] == truth)
    reach = np.zeros(len(recording.token), dtype=np.int64)
    np.maximum.at(reach, position[hit], depth[hit] + 1)
    first_miss = np.full(len(recording.token), np.iinfo(np.int64).max)
    np.minimum.at(first_miss, position[~hit], depth[~hit])
    return torch.from_numpy(np.minimum(reach, first_miss))
