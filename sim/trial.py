"""A trial: one policy replayed on a recording under one setting, priced and summed up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from policies.contract import Policy
from policies.errors import UserError
from sim.family import families, outlooks
from sim.pipelining import first_choice_runs, pipelined_price
from sim.pricing import plain_ms, price
from sim.recorded import tensor
from sim.replay import CycleLog, replay_blocks
from sim.schedule import steps_of
from sim.setting import Setting
from sim.tally import Tally, tally
from traces.costs import CostModel
from traces.recording import Recording

LEAST_FAMILY = 3
"""Policies that draft the same trees share one replay from this number on: it drafts at every position, not at every cycle."""
TEXTS = 4096
"""Priced at a time for plain decoding: a column over all positions need not fit into memory."""


def run_trial(
    recording: Recording,
    policy: Policy,
    setting: Setting,
    cost: CostModel | None = None,
    sequences: Tensor | None = None,
    prices: CostModel | None = None,
) -> Tally:
    """Replay a policy and sum up, priced where a cost model is given, its own decisions included.

    :param sequences: indices int64 of the texts to replay; by default those at the setting's temperature.
    :param prices: price by this one, while policies go on deciding by ``cost``.
    :raises UserError: when the batch is larger than the number of texts, the temperature was not recorded, the profile does
        not reach, or the setting's schedule is not the one that the policy is replayed under.
    """
    return run_trials(recording, [policy], setting, cost, sequences, prices)[0]


def run_trials(
    recording: Recording,
    policies: Sequence[Policy],
    setting: Setting,
    cost: CostModel | None = None,
    sequences: Tensor | None = None,
    prices: CostModel | None = None,
) -> list[Tally]:
    """:func:`run_trial` of several policies, to the same bits; those that draft the same trees share one replay."""
    for policy in policies:
        setting.check(policy)
    cost, prices = (_behind(one, setting) for one in (cost, prices or cost))
    chosen = texts_at(recording, setting.temperature) if sequences is None else sequences
    sums = _Sums(recording, setting, prices, chosen)
    found: dict[int, Tally] = {}
    for family in families(policies):
        if setting.batch == 1:
            blocks = _logs(recording, family, setting, cost, chosen)
            parts = [[sums.of(log, policy) for log, policy in zip(logs, family, strict=True)] for logs in blocks]
            tallies = [Tally.joined(list(own)) for own in zip(*parts, strict=True)]
        else:  # steps are shared by texts of different blocks
            blocks = list(_logs(recording, family, setting, cost, chosen))
            logs = (CycleLog.joined(list(own)) for own in zip(*blocks, strict=True))
            tallies = [sums.of(log, policy) for log, policy in zip(logs, family, strict=True)]
        found |= {id(policy): one for policy, one in zip(family, tallies, strict=True)}
    return [found[id(policy)] for policy in policies]


def tally_of(
    log: CycleLog,
    recording: Recording,
    policy: Policy,
    setting: Setting,
    cost: CostModel | None = None,
    sequences: Tensor | None = None,
) -> Tally:
    """Sum up and price a replay that is at hand: what :func:`run_trial` gives for the policy and the texts that ``log`` is of."""
    setting.check(policy)
    return _Sums(recording, setting, _behind(cost, setting), sequences).of(log, policy)


def _behind(cost: CostModel | None, setting: Setting) -> CostModel | None:
    return cost.behind(setting.context_offset) if cost is not None and setting.context_offset else cost


def _logs(
    recording: Recording, family: list[Policy], setting: Setting, cost: CostModel | None, chosen: Tensor | None
) -> Iterator[Iterator[CycleLog]]:
    """Block by block of texts, the log of each policy of the family."""
    if len(family) >= LEAST_FAMILY:
        for outlook in outlooks(recording, family, setting.drafter, sequences=chosen, cost=cost):
            yield outlook.logs()
    else:
        options = {"sequences": chosen, "cost": cost, "batch": setting.batch}
        for logs in zip(*(replay_blocks(recording, policy, setting.drafter, **options) for policy in family), strict=True):
            yield iter(logs)


class _Sums:
    """Prices and sums up logs; what all of them share is worked out once."""

    def __init__(self, recording: Recording, setting: Setting, cost: CostModel | None, chosen: Tensor | None):
        self.recording, self.setting, self.cost, self.chosen = recording, setting, cost, chosen
        self.joining = setting.schedule == "joining"

    def of(self, log: CycleLog, policy: Policy) -> Tally:
        setting, cost = self.setting, self.cost and self.cost.of(policy.name)
        step = None if setting.batch == 1 else steps_of(log.sequence, setting.batch, self.joining)
        if cost is None:
            return tally(self.recording, log, step=step)
        if setting.execution == "pipelined":
            cycle_ms = pipelined_price(log, cost, self.recording, self._first_choice_runs)
        else:
            cycle_ms = price(log, cost, step, setting.ragged)
        return tally(self.recording, log, cycle_ms, self._plain_ms, step)

    @cached_property
    def _first_choice_runs(self) -> Tensor:
        return first_choice_runs(self.recording, self.setting.drafter)

    @cached_property
    def _plain_ms(self) -> Tensor:
        """Predicted milliseconds float64 [S] of plain decoding of each text; 0 for those that are not replayed."""
        recording, setting = self.recording, self.setting
        length, offset = torch.from_numpy(recording.length.copy()), torch.from_numpy(recording.offset.copy())
        if self.chosen is not None:
            length = length.where(_among(self.chosen, len(length)), 0)
        context = tensor(recording.context_length)
        texts = TEXTS if setting.batch == 1 else len(length)
        return torch.cat(
            [
                plain_ms(
                    context[offset[first] : offset[first + len(part)]],
                    offset[first : first + len(part) + 1] - offset[first],
                    part,
                    self.cost,
                    setting.batch,
                    setting.ragged,
                    self.joining,
                )
                for first, part in zip(range(0, len(length), texts), length.split(texts), strict=True)
            ]
        )


@dataclass
class Trials:
    """Trials on the same texts under one setting, each policy replayed once.

    sequences  indices int64 of the texts; None: those at the setting's temperature
    """

    recording: Recording
    setting: Setting
    cost: CostModel | None = None
    sequences: Tensor | None = None

    def __post_init__(self):
        self._known: dict[Policy, Tally] = {}

    def tallies(self, policies: Sequence[Policy]) -> list[Tally]:
        """One tally per policy, in order."""
        new = [policy for policy in dict.fromkeys(policies) if policy not in self._known]
        if new:
            found = run_trials(self.recording, new, self.setting, self.cost, self.sequences)
            self._known |= dict(zip(new, found, strict=True))
        return [self._known[policy] for policy in policies]

    def tally(self, policy: Policy) -> Tally:
        return self.tallies([policy])[0]

    def ms_per_token(self, policies: Sequence[Policy]) -> list[float]:
        """Predicted, the mean over domains; infinite where the recording lacks something: that would be a guess."""
        return [one.mean("ms_per_token") if one.coverage == 1.0 else float("inf") for one in self.tallies(policies)]


def texts_at(recording: Recording, temperature: float | None) -> Tensor | None:
    """Indices int64 of the texts sampled at a temperature; None (all) when none is asked for.

    :raises UserError: when no text was.
    """
    if temperature is None:
        return None
    found = np.flatnonzero(np.isclose(recording.temperature, temperature, atol=1e-4))
    if not len(found):
        held = ", ".join(f"{value:g}" for value in np.unique(recording.temperature))
        raise UserError(f"no text of {recording.folder} was sampled at temperature {temperature:g}: it holds {held}")
    return torch.from_numpy(found)


def _among(chosen: Tensor, count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.bool).index_fill_(0, chosen, True)
