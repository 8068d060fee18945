"""A DFlash drafter in fixed shapes: catch-ups and blocks as CUDA graphs (see live/graphed_network.py).

Place s of a block lies at capacity + s of each layer's cells.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from live.border import fetched
from live.dflash import DFlashHead
from live.dflash_network import Blocks, seen_block, seen_text
from live.distribution import Ranked, ranked_in_one_piece
from live.graphed_network import CAUGHT_UP, GraphedNetwork, Room


class GraphedDFlash(GraphedNetwork, Blocks):
    def __init__(
        self,
        head: DFlashHead,
        name: str = "dflash",
        capacity: int = 2048,
        graphs: bool = True,
        features: slice = slice(None),
    ):
        config = head.config
        self.layers, self.deepest, self.bottom = config.num_hidden_layers, config.deepest, f"a block drafts {config.deepest} tokens"
        self.spare = max(config.block_size, *CAUGHT_UP)  # a catch-up that is rounded up may end behind the capacity
        super().__init__(head, name, capacity, graphs, features)

    def room(self, rows: int) -> _Room:
        return _Room(self, rows)

    def advance(self, tokens: Tensor, features: Tensor | None, counts: Tensor, everywhere: bool = False) -> Tensor:
        """As every network does; a tree starts from its root's token: int64 [R, 1], or [R, T, 1]."""
        room, tokens = self._room, fetched(tokens.clamp(min=0))
        before, bucket, features = self._following(counts.tolist(), features)
        room.run(("advance", bucket), room.advance, torch.tensor(before)[:, None], features, bucket is not None)
        return tokens[:, :, None] if everywhere else tokens.gather(1, counts[:, None] - 1)

    def open(self, source: Tensor, context_length: Tensor, width: int) -> Ranked:
        room, key = self._room, ("open", width, self.entropies)
        numbers = torch.cat([fetched(context_length)[:, None], fetched(source)], 1)
        logits, told = room.run(key, partial(room.open, width, self.entropies), numbers, None, captured=True)
        self.take(logits, fetched(told))
        return self.begun(len(source), context_length.device, width)


class _Room(Room):
    """The cells of R rows, and their blocks."""

    def advance(self, numbers: Tensor, features: Tensor) -> Tensor:
        """Keep keys and values of the places behind ``numbers`` int64 [R, 1] others, by their features [R, T, F]: int64 [R, T]."""
        head = self.owner.head
        positions = numbers + torch.arange(features.shape[1], device=numbers.device)
        fused = head.fuse(features)
        for layer in range(self.owner.layers):
            self.write(*head.remembered(layer, fused, positions), positions, layer)
        return positions

    def open(self, width: int, entropies: bool, numbers: Tensor, _: None) -> tuple[Tensor, Tensor]:
        """Logits [R, D, V'] of blocks, and their ranking in one piece. :param numbers: places before, and roots: int64 [R, 2]."""
        owner, head = self.owner, self.owner.head
        context, root = numbers.unbind(1)
        own = torch.arange(head.config.block_size, device=numbers.device)
        positions, hidden = context[:, None] + own, head.block(root)
        for layer, (window, causal) in enumerate(zip(head.config.windows, head.config.causal, strict=True)):
            query, key, value = head.project(layer, hidden, positions)
            self.write(key, value, (owner.capacity + own).expand_as(positions), layer)
            visible = torch.zeros((*positions.shape, len(self.place)), dtype=torch.bool, device=numbers.device)
            visible[:, :, : owner.capacity] = seen_text(self.place[: owner.capacity], context, positions, window)
            visible[:, :, owner.capacity : owner.capacity + len(own)] = seen_block(positions, window, causal)
            hidden = head.finish(layer, hidden, self.attend(query, visible, layer))
        logits = head.logits(hidden)
        return logits, ranked_in_one_piece(logits, width, entropies, owner.target_ids)
