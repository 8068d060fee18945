"""The levels of a draft tree as they lie in memory, family by family."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from policies.children import Children, StoredChildren
from policies.order import NONE


class Families(NamedTuple):
    """A level of a tree, W families per row, of K slots each: what decisions that look at every new node read.

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


class Expanded(NamedTuple):
    """One draft forward: the nodes int64 [B, W] that the drafter answered for (-1 = none), and its answer."""

    place: Tensor
    children: Children | StoredChildren


def answered(nodes: Tensor, children: Children | StoredChildren) -> Tensor:
    """bool [B, W]: which ``nodes`` int64 [B, W] were expanded; recorded with too few children, one is missing, yet it was."""
    asked = nodes >= 0
    return asked if children.missing is None else asked & (~children.missing | (children.token[:, :, 0] >= 0))


@lru_cache(maxsize=256)
def layout(shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Family and rank of every slot, int64 [slots] each, of levels with these (families, children of each)."""
    fanout = torch.tensor([fanout for families, fanout in shapes for _ in range(families)], device=device)
    family = torch.repeat_interleave(torch.arange(len(fanout), device=device), fanout)
    rank = torch.arange(len(family), device=device) - (fanout.cumsum(0) - fanout)[family]
    rank[0] = NONE
    return family, rank
