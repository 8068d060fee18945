"""What a draft network must do to serve both live decoding and the recorder, and the bookkeeping they share."""

from __future__ import annotations

from functools import lru_cache
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
    deepest: int | None
    """Depth of the deepest nodes that it drafts; None: as deep as asked."""
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

    def beside(self) -> DraftNetwork:
        """The same network with committed parts of its own, none yet."""

    def join(self, other: DraftNetwork) -> None:
        """The committed parts of ``other``, the same network beside us, behind our own."""

    def forwards(self) -> list[tuple[object, str]]:
        """Owner and name of the methods that are the network's forward pass, for timers (live/breakdown.py)."""


@lru_cache(maxsize=256)
def _all_but_root(trees: int, slots: int, device: torch.device) -> Tensor:
    """What the last slot of a chain sees, bool [B, 1, S]; nobody writes into it."""
    sees = torch.ones((trees, 1, slots), dtype=torch.bool, device=device)
    sees[:, :, 0] = False
    return sees


class Ancestry:
    """Which slots each slot of B trees attends to: its ancestors and itself, but not the root, which lies in the committed part.

    size      int  slots so far, the root's included
    straight  whether every slot is known to be the child of the one before it, in all trees: then each sees all before it, and no
        mask is needed. Only looked for where looking does not wait for a GPU. Nothing is written down until a tree branches.
    """

    def __init__(self, trees: int, device: torch.device, room: int = 32):
        self.size, self.straight = 1, device.type == "cpu"
        self._trees, self._room, self._device = trees, room, device
        if not self.straight:
            self._branch()

    @property
    def depth(self) -> Tensor:
        """int64 [B, S]"""
        if self.straight:
            return torch.arange(self.size, device=self._device).expand(self._trees, -1)
        return self._depth[:, : self.size]

    def add(self, parent: Tensor) -> Tensor:
        """Add W children of the slots ``parent`` int64 [B, W]; what they see: bool [B, W, S]."""
        first, self.size = self.size, self.size + parent.shape[1]
        if self.straight:
            if parent.shape[1] == 1 and set(parent.flatten().tolist()) == {first - 1}:
                return _all_but_root(self._trees, self.size, self._device)
            self.straight = False
            self._branch(first)
        if (more := self.size - self._sees.shape[2]) > 0:
            more = max(more, self._sees.shape[2])
            self._depth = torch.nn.functional.pad(self._depth, (0, more))
            self._sees = torch.nn.functional.pad(self._sees, (0, more, 0, more))
        sees = self._sees.gather(1, parent[:, :, None].expand(-1, -1, self._sees.shape[2]))
        sees[:, :, first : self.size].diagonal(dim1=1, dim2=2).fill_(True)
        self._sees[:, first : self.size] = sees
        self._depth[:, first : self.size] = self._depth.gather(1, parent) + 1
        return sees[:, :, : self.size]

    def below(self, start: Tensor, count: int) -> Tensor:
        """``start`` int64 [B] plus the depth of each of the newest ``count`` slots: int64 [B, count]."""
        if self.straight:
            return start[:, None] + (self.size - 1)
        return start[:, None] + self._depth[:, self.size - count : self.size]

    def _branch(self, chain: int = 1) -> None:
        """Write down what is known of ``chain`` slots one below the other, the root's included."""
        room = max(self._room, chain)
        self._depth = torch.zeros((self._trees, room), dtype=torch.int64, device=self._device)
        self._sees = torch.zeros((self._trees, room, room), dtype=torch.bool, device=self._device)
        if chain > 1:
            self._depth[:, :chain] = torch.arange(chain, device=self._device)
            self._sees[:, 1:chain, 1:chain] = torch.ones(chain - 1, chain - 1, dtype=torch.bool, device=self._device).tril()
