"""What replayed cycles would take on a measured machine, and what plain decoding of the same texts would.

A cycle's cost (DESIGN section 7) = the draft's catch-up on accepted tokens + its draft levels + verification + cache
commit + the overhead of loop and policy. Acceptance comes from the replay, time from a profile: one recording can be
priced on any machine.

The first draft level has no forward of its own: the root's children come out of the catch-up pass, which ends at the
root. So L levels cost one catch-up and L - 1 draft forwards. Right behind the prefill nothing is left to catch up on,
and the first level costs what the profile measured for 0 tokens (the output head). A cycle that does not draft pays
nothing for the draft; the tokens it leaves behind are caught up on by the next cycle that does. Levels that were looked up cost no
forward, but loop and policy their time, and looking takes some as well, even where nothing is found.

Several requests that decode together make a *step*: one cycle of each (`sim.schedule` says which). A step is priced once,
and every request in it waits for the whole step. The requests of a step differ in size, and what that costs depends on
the engine:

    max   rows are padded: all rows pay for the largest, those that draft nothing too (this project's live loop)
    sum   tokens are packed: a step pays for the tokens there are (engines with variable-length kernels)

Profiles are asked per request, so "sum" asks for the mean, between two whole numbers linearly.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from policies.errors import UserError
from sim.replay import CycleLog
from sim.schedule import steps_of
from sim.setting import RAGGED
from traces.costs import CostModel


def price(log: CycleLog, cost: CostModel, step: Tensor | None = None, ragged: str = "max") -> Tensor:
    """Predicted milliseconds of every cycle, float64 [C]: those of the step that it is part of.

    :param step: int64 [C] from :func:`sim.schedule.steps_of`; by default every request decodes alone.
    :raises UserError: where the profile does not reach.
    """
    parts = price_parts(log, cost, step, ragged)
    total = parts["catch_up"] + parts["draft"] + parts["verify"] + parts["commit"] + parts["overhead"]
    return total if step is None else total[step]


def price_parts(log: CycleLog, cost: CostModel, step: Tensor | None = None, ragged: str = "max") -> dict[str, Tensor]:
    """The parts of :func:`price`, milliseconds float64 [T] each per step: catch_up, draft, verify, commit, overhead."""
    together = _Steps(step, ragged, log.kept)
    context, levels = log.context_length, log.levels
    everyone, drafting = levels >= 0, levels > 0
    catch_up = together.pay(cost.catch_up_ms, log.catch_up, context, drafting)
    draft = torch.zeros_like(catch_up)
    for level in range(1, log.widths.shape[1]):  # level by level: a padded sum would round by the padding
        width = log.widths[:, level]
        draft = draft + together.pay(cost.draft_ms, width, context, width > 0)
    return {
        "catch_up": catch_up,
        "draft": draft,
        "verify": together.pay(cost.verify_ms, log.kept + 1, context, everyone),
        "commit": together.pay(lambda tokens, _, rows: cost.commit_ms(tokens, rows), log.accepted + 1, context, everyone),
        "overhead": together.overhead(levels, log.looked_up, cost),
    }


class _Steps:
    """Cycles gathered into the steps they share."""

    def __init__(self, step: Tensor | None, ragged: str, like: Tensor):
        if ragged not in RAGGED:
            raise UserError(f"--ragged must be max or sum, not {ragged!r}")
        self.step, self.packed = step, ragged == "sum"
        self.rows = torch.ones_like(like) if step is None else torch.bincount(step)

    def _sum(self, value: Tensor) -> Tensor:
        return value if self.step is None else torch.zeros_like(self.rows).index_add_(0, self.step, value)

    def _max(self, value: Tensor) -> Tensor:
        """Of values that are not negative."""
        return value if self.step is None else torch.zeros_like(self.rows).scatter_reduce_(0, self.step, value, "amax")

    def pay(self, ask: Callable[..., Tensor], amount: Tensor, context: Tensor, taking_part: Tensor) -> Tensor:
        """Milliseconds float64 [T] of one forward per step over ``amount`` int64 [C] of the cycles that take part."""
        count = self._sum(taking_part.long())
        if not self.packed:
            rows = self.rows
            ms = ask(self._max(amount.where(taking_part, 0)), self._max(context.where(taking_part, 0)), rows)
            return ms.masked_fill(count == 0, 0.0)
        rows = count.clamp(min=1)
        total = self._sum(amount.where(taking_part, 0))
        behind = (self._sum(context.where(taking_part, 0)) + rows - 1) // rows
        low, rest = total // rows, (total % rows).double() / rows
        ms = ask(low, behind, rows) * (1.0 - rest) + ask(low + 1, behind, rows) * rest
        return ms.masked_fill(count == 0, 0.0)

    def overhead(self, levels: Tensor, looked_up: Tensor, cost: CostModel) -> Tensor:
        """Milliseconds float64 [T] of loop and policies, which last as long as those of the busiest request of the step."""
        drafted, copied, rows = self._max(levels), self._max(looked_up), self.rows
        looked = cost.looked_up_ms(copied, rows)
        further = looked - cost.looked_up_ms(drafted.minimum(copied), rows)  # levels at which nobody drafts any more
        ms = cost.overhead_ms(drafted, rows) + cost.look_ms(rows).masked_fill(drafted == 0, 0.0) + further
        return torch.where((drafted == 0) & (copied > 0), looked, ms)


def plain_ms(
    context_length: Tensor,
    offset: Tensor,
    length: Tensor,
    cost: CostModel,
    batch: int = 1,
    ragged: str = "max",
    joining: bool = True,
) -> Tensor:
    """Predicted milliseconds of plain decoding per sequence, float64 [S], prefill excluded.

    The token at position t + 1 costs one step with the root at position t; the first token comes with the prefill, so a
    text of n tokens takes n - 1 steps. The arguments are a recording's: ``context_length`` int64 [P], ``offset`` int64
    [S + 1], ``length`` int64 [S]. Requests share steps as in :func:`price`; each waits for the whole step.
    """
    place = torch.arange(len(context_length), device=context_length.device)
    sequence = torch.searchsorted(offset, place, right=True) - 1
    counted = place - offset[sequence] < length[sequence] - 1
    sequence, context = sequence[counted], context_length[counted]
    step = None if batch == 1 else steps_of(sequence, batch, joining)
    together = _Steps(step, ragged, context)
    ms = together.pay(lambda _, context, rows: cost.plain_ms(context, rows), torch.ones_like(context), context, context >= 0)
    total = torch.zeros(len(length), dtype=torch.float64, device=context_length.device)
    return total.index_add(0, sequence, ms if step is None else ms[step])


def plain_ms_per_token(context_length: Tensor, offset: Tensor, length: Tensor, cost: CostModel) -> float:
    """Predicted milliseconds per token of plain decoding: all steps over all tokens but each text's first.

    NaN when no text has a second token. See :func:`plain_ms` for the arguments.
    """
    steps = int((length - 1).clamp(min=0).sum())
    return float(plain_ms(context_length, offset, length, cost).sum()) / steps if steps else float("nan")
