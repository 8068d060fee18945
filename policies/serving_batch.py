"""Rows that decode together: what batch-wide policies decide over.

A row's serving batch is its ``cycle.group``. Replay runs thousands of rows in lockstep, live decoding a handful; a decision
must come out the same in both. So rows are laid out batch by batch in order of their sequence numbers, whatever order they
came in, and entries of a batch are compared in one total order: score descending, then sequence, then node index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from policies.contract import Cycle
from policies.order import NONE, best


class ServingBatches:
    """The G serving batches of a cycle, of at most R active rows each. Rows that have ended take no part.

    row      int64 [G, R]  rows of each batch by sequence number, -1 = none
    size     int64 [G]     how many there are
    of       int64 [B]     the batch of each row
    context  int64 [G]     the longest context among them, in tokens
    """

    def __init__(self, cycle: Cycle):
        by_sequence = cycle.sequence.argsort(stable=True)
        order = by_sequence[cycle.group[by_sequence].argsort(stable=True)]
        order = order[cycle.active[order]]
        known, self.of = cycle.group.unique(return_inverse=True)
        own = self.of[order]
        self.size = torch.bincount(own, minlength=len(known))
        place = torch.arange(len(order), device=order.device) - (self.size.cumsum(0) - self.size)[own]
        most = int(self.size.max()) if len(order) else 0
        self.row = torch.full((len(known), most), NONE, device=order.device).index_put_((own, place), order)
        self.context = torch.zeros_like(self.size).scatter_reduce_(0, own, cycle.context_length[order], "amax")

    def to_rows(self, value: Tensor) -> Tensor:
        """The value [B, ...] of each row's batch, out of ``value`` [G, ...]."""
        return value[self.of]

    def ranked(self, score: Tensor) -> tuple[Tensor, Tensor]:
        """All entries of each batch, best first: (entry int64 [G, E], score float32 [G, E]), -1 and -inf behind the last.

        :param score: float32 [B, N], -inf = no entry. An entry is numbered by row place and column: place * N + column.
        """
        flat = score[self.row.clamp(min=0)].masked_fill((self.row < 0)[:, :, None], -torch.inf).flatten(1)
        entry = best(flat, flat.shape[1])
        return entry, flat.gather(1, entry.clamp(min=0)).masked_fill(entry < 0, -torch.inf)

    def first(self, entry: Tensor, count: Tensor, columns: int) -> Tensor:
        """Which columns of each row are among the first ``count`` int64 [G] entries of its batch: bool [B, columns].

        :param entry: int64 [G, E] from :meth:`ranked`, of a score with so many columns.
        """
        chosen = (entry >= 0) & (torch.arange(entry.shape[1], device=entry.device) < count[:, None])
        row = self.row.gather(1, (entry // max(columns, 1)).clamp(min=0))
        kept = torch.zeros((len(self.of), columns), dtype=torch.bool, device=entry.device)
        kept[row[chosen], (entry % max(columns, 1))[chosen]] = True
        return kept


def tier_of(size: Tensor, smallest: list[int]) -> Tensor:
    """The tier int64 [G] of batches of ``size`` int64 [G]: the last whose ``smallest`` batch (ascending) is not above it."""
    return (torch.searchsorted(torch.tensor(smallest, device=size.device), size, right=True) - 1).clamp(min=0)
