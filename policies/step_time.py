"""What one step of a serving batch takes under the cost model: a cycle of all its requests.

A step waits for its slowest request, so the longest context of the batch counts. The draft's catch-up and the commit are
asked for one token each: how many there will be is not known when a policy decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policies.contract import Cycle
from policies.cost import Cost
from policies.errors import UserError
from policies.serving_batch import ServingBatches


def cost_of(cycle: Cycle, policy: str) -> Cost:
    """The cycle's cost model; a UserError where there is none."""
    if cycle.cost is None:
        raise UserError(f"policy '{policy}' weighs time against tokens and needs a cost model: pass --profile FILE")
    return cycle.cost


def chain_ms(cost: Cost, batches: ServingBatches, lengths: Tensor) -> Tensor:
    """ms float64 [G, K] of steps in which every request drafts and verifies ``lengths`` int64 [K] tokens; 0 = plain."""
    context, rows = batches.context[:, None], batches.size.clamp(min=1)[:, None]
    length = lengths[None].expand(len(rows), -1)
    return drafting_ms(cost, context, rows, length) + cost.verify_ms(length + 1, context, rows)


def packed_ms(cost: Cost, batches: ServingBatches, drafted: int, tokens: Tensor) -> Tensor:
    """ms float64 [G, M] of steps in which every request drafts ``drafted`` tokens and the batch verifies ``tokens`` in all.

    Requests keep different numbers of tokens, and serving engines pack them: a step pays for the tokens there are. The
    cost model is asked per request, so the mean counts, between two whole numbers linearly (as in `sim.pricing`).

    :param tokens: int64 [G, M], the requests' roots included.
    """
    context, rows = batches.context[:, None], batches.size.clamp(min=1)[:, None]
    low, rest = tokens // rows, (tokens % rows).double() / rows
    verify = cost.verify_ms(low, context, rows) * (1 - rest) + cost.verify_ms(low + 1, context, rows) * rest
    return verify + drafting_ms(cost, context, rows, torch.full_like(rows, drafted))


def drafting_ms(cost: Cost, context: Tensor, rows: Tensor, length: Tensor) -> Tensor:
    """All of a step but verification, ms float64: drafting chains of ``length`` int64 tokens, commit, overhead."""
    one = torch.ones_like(length)
    catch_up = cost.catch_up_ms(one, context, rows).masked_fill(length == 0, 0.0)
    draft = (length - 1).clamp(min=0) * cost.draft_ms(one, context, rows)
    return catch_up + draft + cost.commit_ms(one, rows) + cost.overhead_ms(length, rows)
