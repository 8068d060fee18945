"""A level of a draft tree as it lies in memory: what decisions that look at every new node read."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Families(NamedTuple):
    """A level of a tree: W families per row, of K slots each.

    node     int64   [B, W * K]  the node in each slot, -1 = empty; None: no slot of any level is empty, so that the level's
             nodes are the tree's last W * K, in order, from ``first`` on
    parent   int64   [B, W]      whose children they are, -1 = no family
    logprob  float32 [B, W, K]   of each slot's node given its parent (nats); -inf in empty slots
    entropy  float32 [B, W]      of the distribution that they were taken from (nats, full vocabulary)
    score    float32 [B, W * K]  path log-probability (nats) of each slot's node; -inf in empty slots
    """

    node: Tensor | None
    first: int
    parent: Tensor
    logprob: Tensor
    entropy: Tensor
    score: Tensor

    def nodes_in(self, slot: Tensor) -> Tensor:
        """The nodes int64 [B, M] in some of the level's slots int64 [B, M], -1 = empty."""
        return slot + self.first if self.node is None else self.node.gather(1, slot)
