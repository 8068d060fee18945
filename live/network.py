"""What a draft network must do to serve both live decoding and the recorder, and the bookkeeping they share."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from live.distribution import Ranked


class DraftNetwork(Protocol):
    """A draft model with a committed part (the true text) and B trees growing on top of it.

    Live decoding has one tree per row (R = B); the recorder grows the trees of B positions on one text (R = 1).
    Slots number the expanded nodes of a tree in the order of their expansion; slot 0 is the root.
    """

    name: str
    kind: str
    needs_features: bool
    entropies: bool
    """Whether anybody wants to know the entropies; true again after each :meth:`reset`."""

    def reset(self, rows: int) -> None:
        """Forget everything; ``rows`` fresh committed parts."""

    def advance(self, tokens: Tensor, features: Tensor | None, counts: Tensor, everywhere: bool = False) -> Tensor:
        """Commit tokens int64 [R, T] (right padded, counts int64 [R]) with the target's features of the places before them.

        Returns what :meth:`open` needs to start trees behind the last valid place [R, X], or behind each place [R, T, X].
        """

    def open(self, source: Tensor, context_length: Tensor, width: int) -> Ranked:
        """Start B trees whose roots sit at ``context_length`` int64 [B]; the ``width`` best children of each root [B, K]."""

    def grow(self, parent: Tensor, token: Tensor, width: int) -> Ranked:
        """Expand nodes: parent slots and tokens int64 [B, W] (token -1 = padding); children [B, W, K]. Takes W new slots."""

    def gather_rows(self, rows: Tensor) -> None:
        """Keep only these rows int64 [R'] of the committed part."""

    def forwards(self) -> list[tuple[object, str]]:
        """Owner and name of the methods that are the network's forward pass, for timers (live/breakdown.py)."""


class Ancestry:
    """Slots of each slot's ancestors, itself included and the root left out: int64 [B, S, D], -1 padding on the right."""

    def __init__(self, trees: int, device: torch.device):
        self.slots = torch.full((trees, 1, 1), -1, device=device)
        self.depth = torch.zeros((trees, 1), dtype=torch.int64, device=device)

    def add(self, parent: Tensor) -> Tensor:
        """Add W children of the slots ``parent`` int64 [B, W]; their ancestor slots [B, W, D]."""
        trees, count = parent.shape
        size = self.slots.shape[1]
        above = self.slots.gather(1, parent[:, :, None].expand(-1, -1, self.slots.shape[2]))
        depth = self.depth.gather(1, parent) + 1
        if int(depth.max()) > self.slots.shape[2]:
            above = torch.nn.functional.pad(above, (0, 1), value=-1)
            self.slots = torch.nn.functional.pad(self.slots, (0, 1), value=-1)
        own = torch.arange(size, size + count, device=parent.device).expand(trees, count)
        above = above.scatter(2, (depth - 1)[:, :, None], own[:, :, None])
        self.slots = torch.cat([self.slots, above], dim=1)
        self.depth = torch.cat([self.depth, depth], dim=1)
        return above


class Slots:
    """One value per slot of B trees, [B, S, ...], in a room that doubles: adding a level copies that level only."""

    def __init__(self, first: Tensor):
        """:param first: the roots' values [B, 1, ...]."""
        self._room, self.size = first, first.shape[1]

    @property
    def values(self) -> Tensor:
        """[B, S, ...], of all slots so far."""
        return self._room[:, : self.size]

    def append(self, level: Tensor) -> None:
        """Add the values [B, W, ...] of W new slots."""
        needed = self.size + level.shape[1]
        if needed > self._room.shape[1]:
            room = level.new_zeros((len(level), max(needed, 2 * self._room.shape[1]), *level.shape[2:]))
            room[:, : self.size] = self.values
            self._room = room
        self._room[:, self.size : needed] = level
        self.size = needed
