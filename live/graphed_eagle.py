"""An EAGLE head in fixed shapes: catch-ups and draft levels as CUDA graphs (see live/graphed_network.py).

The cell of tree slot s lies at capacity + s. Frontier widths are rounded up as well.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from live.border import fetched
from live.distribution import Ranked, ranked, ranked_in_one_piece
from live.eagle1 import Eagle1Head, EagleHead
from live.graphed import bucket_of
from live.graphed_network import GraphedNetwork, Room

SLOTS = 256
"""Tree slots of a row; a draft tree that expands more nodes is a crash of the draft, which decoding survives."""
WIDTHS = (1, 2, 4, 8, 10, 16, 24, 32, 48, 64)
"""Frontier widths that a level is captured for."""


class GraphedEagle(GraphedNetwork):
    deepest = None
    spare = SLOTS

    def __init__(
        self,
        head: EagleHead,
        name: str = "eagle3",
        capacity: int = 2048,
        graphs: bool = True,
        features: slice = slice(None),
    ):
        self.kind = "eagle" if isinstance(head, Eagle1Head) else "eagle3"
        super().__init__(head, name, capacity, graphs, features)

    def room(self, rows: int) -> _Room:
        return _Room(self, rows)

    def advance(self, tokens: Tensor, features: Tensor | None, counts: Tensor, everywhere: bool = False) -> Tensor:
        room, new, count = self._room, counts.tolist(), tokens.shape[1]
        before, bucket, features = self._following(new, features)
        numbers = np.zeros((len(new), features.shape[1] + 2), dtype=np.int64)
        np.maximum(fetched(tokens).numpy(), 0, out=numbers[:, :count])
        numbers[:, -2], numbers[:, -1] = before, new
        hidden, last = room.run(("advance", bucket), room.advance, torch.from_numpy(numbers), features, bucket is not None)
        return hidden[:, :count].clone() if everywhere else last

    def open(self, source: Tensor, context_length: Tensor, width: int) -> Ranked:
        room = self._room
        self._slots = 1
        key, compute = ("open", width, self.entropies), self._ranking(room.open, width)
        logits, told = room.run(key, compute, fetched(context_length)[:, None], source[:, None], captured=True)
        return Ranked(*(part[:, 0] for part in self._told(logits, told, width)))

    def grow(self, parent: Tensor, token: Tensor, width: int) -> Ranked:
        """As every network does; raises ValueError when the tree has no slot for the nodes."""
        room, count = self._room, parent.shape[1]
        size = bucket_of(WIDTHS, count)
        captured = size is not None and self._slots + size <= SLOTS
        size = size if captured else count
        if self._slots + size > SLOTS:
            raise ValueError(f"the draft tree expands more than {SLOTS} nodes")
        numbers = np.zeros((len(parent), 2 * size + 1), dtype=np.int64)
        numbers[:, :count], numbers[:, -1] = fetched(parent).numpy(), self._slots
        np.maximum(fetched(token).numpy(), 0, out=numbers[:, size : size + count])
        self._slots += count
        key, compute = ("grow", size, width, self.entropies), self._ranking(room.grow, width)
        logits, told = room.run(key, compute, torch.from_numpy(numbers), None, captured)
        return self._told(logits[:, :count], told[:, :count], width)

    def _ranking(self, forward: Callable[[Tensor, Tensor | None], Tensor], width: int) -> Callable[..., tuple[Tensor, Tensor]]:
        return partial(_ranked, forward, width, self.entropies, self.target_ids)

    def _told(self, logits: Tensor, told: Tensor, width: int) -> Ranked:
        """The ranking float64 [R, W, 2 K + 2] of logits [R, W, Vd], on the host; anew where equal numbers left the order open."""
        told = fetched(told)
        if not told.numpy()[..., -1].any():
            return Ranked.of_one_piece(told[..., :-1])
        found = ranked(logits, width, self.entropies)
        index = found.index if self.target_ids is None else self.target_ids.take(found.index)
        return found._replace(index=index).fetched()


def _ranked(
    forward: Callable[[Tensor, Tensor | None], Tensor],
    width: int,
    entropies: bool,
    ids: Tensor | None,
    numbers: Tensor,
    wide: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A forward pass that gives logits, and their ranking."""
    logits = forward(numbers, wide)
    return logits, ranked_in_one_piece(logits, width, entropies, ids)


class _Room(Room):
    """The cells and trees of R rows."""

    def __init__(self, owner: GraphedEagle, rows: int):
        super().__init__(owner, rows)
        head, device = owner.head, owner.device
        with torch.inference_mode(False):  # tensors that may be written to in every mode
            self.prefix = torch.zeros(rows, dtype=torch.int64, device=device)
            self.hidden = torch.zeros((rows, SLOTS, head.hidden_size), dtype=owner.dtype, device=device)
            self.depth = torch.zeros((rows, SLOTS), dtype=torch.int64, device=device)
            self.sees = torch.zeros((rows, SLOTS, SLOTS), dtype=torch.bool, device=device)

    def advance(self, numbers: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of committed cells behind those before: of all T [R, T, H], and of each row's last one [R, H].

        :param numbers: tokens, cells before and how many count: int64 [R, T + 2].
        :param features: [R, T, F] of the places before the tokens.
        """
        head, count = self.owner.head, numbers.shape[1] - 2
        tokens, before, counts = numbers.split([count, 1, 1], 1)
        positions = before + torch.arange(count, device=numbers.device)
        residual, query, key, value = head.project(head.fuse(features), tokens, positions)
        self.write(key, value, positions)
        visible = self.place <= positions[:, :, None]  # tree cells lie behind all committed ones
        output = head.finish(residual, self.attend(query, visible))
        return output, output.gather(1, (counts - 1)[:, :, None].expand(-1, 1, output.shape[2]))[:, 0]

    def open(self, numbers: Tensor, source: Tensor) -> Tensor:
        """Logits [R, 1, Vd] of new trees' roots at places ``numbers`` int64 [R, 1], from outputs ``source`` [R, 1, H]."""
        self.prefix.copy_(numbers[:, 0])
        self.hidden[:, :1] = source
        self.depth.zero_()
        self.sees.zero_()
        return self.owner.head.logits(source)

    def grow(self, numbers: Tensor, _: None) -> Tensor:
        """Logits [R, W, Vd] of new slots; what belongs to the slots is kept.

        :param numbers: the slots' parents, their tokens and the first slot: int64 [R, 2 W + 1].
        """
        head, count, device = self.owner.head, numbers.shape[1] // 2, numbers.device
        parent, token, first = numbers.split([count, count, 1], 1)
        slots = first[0] + torch.arange(count, device=device)
        depth = self.depth.gather(1, parent) + 1
        own = torch.arange(SLOTS, device=device) == slots[:, None]
        sees = self.sees.gather(1, parent[:, :, None].expand(-1, -1, SLOTS)) | own
        hidden = self.hidden.gather(1, parent[:, :, None].expand(-1, -1, self.hidden.shape[2]))
        residual, query, key, value = head.project(hidden, token, self.prefix[:, None] + depth - 1)
        self.write(key, value, (self.owner.capacity + slots).expand_as(parent))
        committed = (self.place[: self.owner.capacity] < self.prefix[:, None])[:, None].expand(-1, count, -1)
        output = head.finish(residual, self.attend(query, torch.cat([committed, sees], dim=2)))
        self.depth[:, slots], self.sees[:, slots], self.hidden[:, slots] = depth, sees, output
        return head.logits(output)
