"""What the parts of a cycle cost, as tables: made once from a cost model, and looked up while deciding.

Asking a cost model takes some twenty small operations, too many for every level of every cycle. A policy that weighs time asks
it once for all sizes at a few contexts; a request is priced at the nearest of them that is not longer than its own. All prices
are those of a request that decodes alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from policies.cost import Cost

CONTEXTS = (0, *(2**power for power in range(5, 18)))
"""Tokens before the root at which prices are asked for: 0, 32, 64, ... 131072."""


class Prices(NamedTuple):
    """Milliseconds float64 at C contexts.

    context  int64 [C]         ascending, from 0
    plain    [C]               a cycle that drafts nothing
    verify   [C, V]            n further verified tokens, for n = 0 .. V - 1
    level    [depth, C, W + 1] a draft level of each width from 0, the loop's overhead included; the first one costs the draft's
             catch-up, whatever its width
    """

    context: Tensor
    plain: Tensor
    verify: Tensor
    level: tuple[Tensor, ...]


def prices_at(cost: Cost, context: Tensor, depth: int, widest: int, tokens: int) -> Prices:
    """The prices under a cost model at ``context`` int64 [C]: up to ``depth`` levels, ``widest`` nodes in a frontier and ``tokens``
    verified tokens, root included. Raises UserError where the cost model does not reach."""
    one, behind = torch.ones((), dtype=torch.int64), context[:, None]
    verify = cost.verify_ms(torch.arange(1, tokens + 1), behind, one)
    overhead = cost.overhead_ms(torch.arange(depth + 1), one)
    plain = verify[:, 0] + cost.commit_ms(one, one) + overhead[0]
    width = torch.arange(1, widest + 1)
    first = cost.catch_up_ms(one, behind, one).expand(-1, widest)
    further = cost.draft_ms(width, behind, one)
    added = overhead.diff().tolist()
    level = [torch.nn.functional.pad((further if place else first) + more, (1, 0)) for place, more in enumerate(added)]
    return Prices(context, plain, verify - verify[:, :1], tuple(level))
