"""A trial: one policy replayed on a recording under one setting, priced and summed up."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from policies.contract import Policy
from policies.errors import UserError
from sim.pipelining import pipelined_price
from sim.pricing import plain_ms, price
from sim.recorded import RecordedText
from sim.replay import replay
from sim.schedule import steps_of
from sim.setting import Setting
from sim.tally import Tally, tally
from traces.costs import CostModel
from traces.recording import Recording


def run_trial(
    recording: Recording, policy: Policy, setting: Setting, cost: CostModel | None = None, sequences: Tensor | None = None
) -> Tally:
    """Replay a policy and sum up, priced where a cost model is given.

    :param sequences: indices int64 of the texts to replay; by default those at the setting's temperature.
    :raises UserError: when the batch is larger than the number of texts, the temperature was not recorded, or the profile
        does not reach.
    """
    if cost is not None and setting.context_offset:
        cost = cost.behind(setting.context_offset)
    chosen = texts_at(recording, setting.temperature) if sequences is None else sequences
    log = replay(recording, policy, setting.drafter, sequences=chosen, cost=cost, batch=setting.batch)
    joining = not policy.batch_wide  # such a policy decided for the fixed groups that replay ran
    step = None if setting.batch == 1 else steps_of(log.sequence, setting.batch, joining)
    if cost is None:
        return tally(recording, log, step=step)
    if setting.execution == "pipelined":
        cycle_ms = pipelined_price(log, cost, recording, setting.drafter)
    else:
        cycle_ms = price(log, cost, step, setting.ragged)
    text = RecordedText(recording)
    length = text.length if chosen is None else text.length.where(_among(chosen, len(text.length)), 0)
    plain = plain_ms(text.context_length, text.offset, length, cost, setting.batch, setting.ragged, joining)
    return tally(recording, log, cycle_ms, plain, step)


def run_trials(recording: Recording, policies: list[Policy], setting: Setting, cost: CostModel | None = None) -> list[Tally]:
    """Several policies of one kind under one setting. Settings that draft the same trees could share one replay here."""
    return [run_trial(recording, policy, setting, cost) for policy in policies]


def texts_at(recording: Recording, temperature: float | None) -> Tensor | None:
    """Indices int64 of the texts sampled at a temperature; None (all) when none is asked for.

    :raises UserError: when no text was.
    """
    if temperature is None:
        return None
    found = np.flatnonzero(np.isclose(recording.temperature, temperature))
    if not len(found):
        held = ", ".join(f"{value:g}" for value in np.unique(recording.temperature))
        raise UserError(f"no text of {recording.folder} was sampled at temperature {temperature:g}: it holds {held}")
    return torch.from_numpy(found)


def _among(chosen: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.bool).index_fill_(0, chosen, True)
