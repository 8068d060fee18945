"""Which cycles decode together: requests that share a serving batch, as they join and leave.

Joining: at most ``batch`` requests decode side by side; when one has ended, the next in request order takes its place at the
following step (continuous batching). The queue never runs dry before the recording does, so the last steps are less full.
Fixed: the requests form groups of ``batch``, which shrink as texts end and admit nobody. That is how replay runs a
policy that decides for the whole batch, so only this schedule prices what such a policy saw.

Fixed groups take more steps for the same texts, so policies compare only under one schedule: `sim.setting.Setting.scheduled`
chooses it for all that stand in a table.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from policies.errors import UserError


def steps_of(sequence: Tensor, batch: int, joining: bool = True) -> Tensor:
    """The step int64 [C] at which each cycle runs; steps count from 0 and none is empty.

    :param sequence: int64 [C] whose cycle it is; a sequence's cycles stand together, in order.
    :raises UserError: when the batch is larger than the number of sequences.
    """
    _, cycles = torch.unique_consecutive(sequence, return_counts=True)
    if not 1 <= batch <= len(cycles):
        raise UserError(
            f"a batch of {batch} does not fit: the recording has {len(cycles)} texts to decode; "
            f"choose a batch between 1 and {len(cycles)}, or record more prompts"
        )
    start = _joining(cycles, batch) if joining else _fixed(cycles, batch)
    number = torch.arange(len(sequence)) - torch.repeat_interleave(cycles.cumsum(0) - cycles, cycles)
    return torch.repeat_interleave(start, cycles) + number


def _joining(cycles: Tensor, batch: int) -> Tensor:
    """First step int64 [S] of each request, with ``batch`` places that are taken in request order."""
    free, start = [0] * batch, []
    for count in cycles.tolist():
        start.append(heapq.heappop(free))
        heapq.heappush(free, start[-1] + count)
    return torch.tensor(start)


def _fixed(cycles: Tensor, batch: int) -> Tensor:
    """First step int64 [S] of each request, group after group."""
    group = torch.arange(len(cycles)) // batch
    longest = torch.zeros(int(group[-1]) + 1, dtype=torch.int64).scatter_reduce_(0, group, cycles, "amax")
    return (longest.cumsum(0) - longest)[group]
