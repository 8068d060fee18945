"""The levels of a draft tree as they lie in memory, family by family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from policies.children import Children, StoredChildren, stacked, topk_entropy
from policies.order import NONE


class Listed(NamedTuple):
    """A level of one tree as numbers on the host, F families of K slots each.

    node     [F * K]  the node in each slot, -1 = empty
    fanout   K
    logprob  [F * K]  of each slot's node given its parent (nats); -inf in empty slots
    entropy  [F]      of the distribution that each family was taken from (nats, full vocabulary)
    score    [F * K]  path log-probability (nats) of each slot's node; -inf in empty slots
    """

    node: Sequence[int]
    fanout: int
    logprob: list[float]
    entropy: list[float]
    score: list[float]


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

    def listed(self) -> Listed:
        """The same of a single row, as numbers on the host."""
        score = self.score[0].tolist()
        node = range(self.first, self.first + len(score)) if self.node is None else self.node[0].tolist()
        return Listed(node, self.logprob.shape[2], self.logprob[0].flatten().tolist(), self.entropy[0].tolist(), score)


class Expanded(NamedTuple):
    """One draft forward: the nodes int64 [B, W] that the drafter answered for (-1 = none), and its answer."""

    place: Tensor
    children: Children | StoredChildren


def answered(nodes: Tensor, children: Children | StoredChildren) -> Tensor:
    """bool [B, W]: which ``nodes`` int64 [B, W] were expanded; recorded with too few children, one is missing, yet it was."""
    asked = nodes >= 0
    return asked if children.missing is None else asked & (~children.missing | (children.token[:, :, 0] >= 0))


def topk_entropies(expansions: list[Expanded], nodes: Tensor) -> Tensor:
    """The top-K entropy float32 [B, W] (nats) of ``nodes`` int64 [B, W], -1 for those that were not expanded."""
    if not expansions:
        return torch.full(nodes.shape, -1.0, device=nodes.device)
    expanded = torch.cat([part.place for part in expansions], dim=1)
    same = expanded[:, None, :] == nodes.masked_fill(nodes < 0, NONE - 1)[:, :, None]
    place = same.to(torch.int8).argmax(2)
    logprob = stacked([part.children.logprob for part in expansions])
    mine = logprob.gather(1, place[:, :, None].expand(-1, -1, logprob.shape[2]))
    return topk_entropy(mine).masked_fill(~same.any(2), -1.0)


def write_in(column: Tensor, expansions: list[Expanded], value: Callable[[Expanded], Tensor]) -> Tensor:
    """A column [B, N + 1] with the ``value`` [B, W] of each expansion's nodes written in; its last place catches those of none."""
    if not expansions:
        return column
    place = torch.cat([part.place for part in expansions], dim=1)
    values = torch.cat([value(part) for part in expansions], dim=1)
    return column.scatter_(1, place.masked_fill(place < 0, column.shape[1] - 1), values)


def packed_level(node: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """The nodes int64 [B, M] (-1 = empty slot) and scores of a level without its empty slots: [B, M'], padded on the right."""
    exists = node >= 0
    first = torch.argsort((~exists).to(torch.int8), dim=1, stable=True)[:, : int(exists.sum(1).max())]
    return node.gather(1, first), score.gather(1, first)


@lru_cache(maxsize=256)
def layout(shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Family, rank and level of every slot, int64 [slots] each, of levels with these (families, children of each)."""
    fanout = torch.tensor([fanout for families, fanout in shapes for _ in range(families)], device=device)
    family = torch.repeat_interleave(torch.arange(len(fanout), device=device), fanout)
    rank = torch.arange(len(family), device=device) - (fanout.cumsum(0) - fanout)[family]
    rank[0] = NONE
    slots = torch.tensor([families * fanout for families, fanout in shapes], device=device)
    return family, rank, torch.repeat_interleave(torch.arange(len(shapes), device=device), slots)


@lru_cache(maxsize=64)
def root_columns(rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What holds of every root: -1 int64 [B, 1] and 0.0 float32 [B, 1]; nobody writes into them."""
    return torch.full((rows, 1), NONE, device=device), torch.zeros((rows, 1), dtype=torch.float32, device=device)
