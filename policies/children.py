"""What a drafter answers: the children of the nodes it was asked to expand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from policies.order import NONE


class Children(NamedTuple):
    """What a drafter answers when W nodes per row are expanded; padded frontier places hold -1 tokens.

    token    int64   [B, W, K]  target token ids, most probable first, -1 where there are fewer
    logprob  float32 [B, W, K]  draft log q (nats) of each child given its parent, -inf where there is none
    entropy  float32 [B, W]     entropy (nats) of the whole next-token distribution of the expanded node
    handle   int64   [B, W, K]  the drafter's own reference to each child, opaque to everyone else
    missing  bool    [B, W]     the drafter could not answer: a recording does not hold this expansion; None = all answered
    free     bool    [B]        rows that were answered without a draft forward; None = none
    held     int64   [B]        the most children of a node that the drafter can tell of, by row; None = K in all rows
    """

    token: Tensor
    logprob: Tensor
    entropy: Tensor
    handle: Tensor
    missing: Tensor | None = None
    free: Tensor | None = None
    held: Tensor | None = None


class Only(NamedTuple):
    """The only child of a single node in the host's memory, or that it has none, as numbers; see :class:`Children`."""

    token: int
    logprob: float
    entropy: float
    handle: int

    def children(self) -> Children:
        """The same as an answer to one node of one row."""
        token, handle = (torch.full((1, 1, 1), number) for number in (self.token, self.handle))
        return Children(token, _number(self.logprob, 3), _number(self.entropy, 2), handle)


@lru_cache(maxsize=1024)
def _number(value: float, axes: int) -> Tensor:
    """A number as float32 [1, ...], made once; nobody writes into it."""
    return torch.full((1,) * axes, value, dtype=torch.float32)


class ChildTable(NamedTuple):
    """Recorded expansions, E rows. A child's handle is its place in the table: row * K + rank.

    token    int32   [E, K]  most probable first, -1 where there are fewer
    logprob  float32 [E, K]  draft log q (nats), -inf where there is none
    entropy  float32 [E]     entropy (nats) of the expanded node's next-token distribution
    """

    token: Tensor
    logprob: Tensor
    entropy: Tensor

    @property
    def fanout(self) -> int:
        return self.token.shape[1]

    def tokens(self, handle: Tensor) -> Tensor:
        """Tokens int64 [...] of children by handle; where the handle is below 0 they mean nothing."""
        return self.token.view(-1)[handle.clamp(min=0)].to(torch.int64)


@dataclass(frozen=True)
class StoredChildren:
    """Children that lie in a table. ``token``, ``entropy`` and ``handle`` are as in :class:`Children`, read when asked for.

    A policy compares the path probability of every node that it drafts, but tokens matter only at the nodes that it keeps
    and handles only at those that it expands: nothing else is copied out of a recording.

    row      int64   [B, W]     which row of the table answers, -1 = none
    logprob  float32 [B, W, K]  -inf where no row answers; elsewhere there are always K children
    missing  bool    [B, W]     the recording does not hold this expansion; None = it holds all
    """

    table: ChildTable
    row: Tensor
    logprob: Tensor
    missing: Tensor | None

    @property
    def fanout(self) -> int:
        return self.logprob.shape[2]

    @property
    def free(self) -> None:
        """A recorded expansion stands for a draft forward."""

    @property
    def held(self) -> None:
        """The table is as wide in all rows."""

    @cached_property
    def handle(self) -> Tensor:
        """int64 [B, W, K]; where no row answers it means nothing."""
        return self.row.clamp(min=0)[:, :, None] * self.table.fanout + torch.arange(self.fanout, device=self.row.device)

    @cached_property
    def token(self) -> Tensor:
        """int64 [B, W, K]"""
        return self.table.tokens(self.handle).masked_fill(self.row[:, :, None] < 0, NONE)

    @cached_property
    def entropy(self) -> Tensor:
        """float32 [B, W]"""
        return self.table.entropy[self.row.clamp(min=0)].masked_fill(self.row < 0, -1.0)

    def read(self) -> Children:
        """The same with everything read."""
        missing = torch.zeros_like(self.row, dtype=torch.bool) if self.missing is None else self.missing
        return Children(self.token, self.logprob, self.entropy, self.handle, missing)


def lacking(children: Children | StoredChildren, nodes: Tensor, branching: int | Tensor) -> Tensor | None:
    """Which of the asked ``nodes`` int64 [B, W] a recording does not hold, or with fewer than ``branching`` (int or int64 [B, W])
    children: bool [B, W]; None = none, as of a drafter that answers everything."""
    if not isinstance(children, StoredChildren) and children.missing is None:
        return None
    held = children.logprob.shape[2] if children.held is None else children.held[:, None]
    if isinstance(branching, int) and isinstance(held, int) and branching <= held:
        return children.missing
    short = (nodes >= 0) & (branching > held)
    return short if children.missing is None else children.missing | short


def stacked(logprobs: list[Tensor]) -> Tensor | None:
    """Log-probabilities [B, W, K] of several levels side by side, the narrower ones filled up with -inf."""
    if not logprobs:
        return None
    fanout = max(part.shape[2] for part in logprobs)
    pad = torch.nn.functional.pad
    return torch.cat([pad(part, (0, fanout - part.shape[2]), value=-torch.inf) for part in logprobs], dim=1)


def topk_entropy(logprob: Tensor) -> Tensor:
    """Entropy float32 [...] in nats of the renormalised distribution over the last axis [..., K] (-inf = absent).

    Elementwise in float64 with a sum of fixed order, rounded at the end: the same bits at every batch shape.
    """
    value = logprob.movedim(-1, 0).contiguous().to(torch.float64)  # ranks first, so that each term is one plain run
    shifted = value - value[0]  # children come most probable first
    weight = torch.exp(shifted)
    product = weight * torch.where(weight > 0, shifted, 0.0)
    total, weighted = torch.zeros_like(weight[0]), torch.zeros_like(weight[0])
    for rank in range(logprob.shape[-1]):
        total += weight[rank]
        weighted += product[rank]
    entropy = torch.log(total) - weighted / total
    return torch.where(torch.isfinite(entropy), entropy, 0.0).to(torch.float32)
