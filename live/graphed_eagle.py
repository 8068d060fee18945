"""An EAGLE head in fixed shapes, so that a GPU replays catch-ups and draft levels as CUDA graphs (see live/graphed.py).

For live decoding: one tree per row. A row's cells lie in one buffer [R, kv heads, capacity + SLOTS, d]: the committed ones from
the left, and the cell of tree slot s at capacity + s. Attention looks at the whole buffer under a mask. Frontier widths and
numbers of tokens to catch up on are rounded up; what is computed beyond them is written over by what comes next.

A level's ranking belongs to its graph: one copy of small numbers is sent before a replay, one is fetched behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from live.border import fetched, sent
from live.distribution import Ranked, ranked, ranked_in_one_piece
from live.eagle1 import Eagle1Head, EagleHead
from live.graphed import bucket_of, record, updates_allowed

SLOTS = 256
"""Tree slots of a row; a draft tree that expands more nodes is a crash of the draft, which decoding survives."""
WIDTHS = (1, 2, 4, 8, 10, 16, 24, 32, 48, 64)
"""Frontier widths that a level is captured for."""
CAUGHT_UP = (1, 2, 4, 6, 9, 16)
"""Numbers of committed tokens that a catch-up is captured for."""


class GraphedEagle:
    """A draft network (live/network.py) of fixed shapes, for ``capacity`` committed cells of each row. Rankings lie on the host."""

    needs_features = True
    deepest = None
    entropies = True

    def __init__(
        self,
        head: EagleHead,
        name: str = "eagle3",
        capacity: int = 2048,
        graphs: bool = True,
        features: slice = slice(None),
    ):
        """:param features: which of the captured numbers are the head's."""
        self.head, self.name, self.features = head, name, features
        self.kind = "eagle" if isinstance(head, Eagle1Head) else "eagle3"
        self.capacity = -(-capacity // 64) * 64
        like = head.fc.weight
        self.dtype, self.device = like.dtype, like.device
        self.graphs = graphs and self.device.type == "cuda"
        self._memory = torch.cuda.graph_pool_handle() if self.graphs else None
        offsets = head.d2t
        self.target_ids = None if offsets is None else offsets + torch.arange(len(offsets), device=offsets.device)
        self._rooms: dict[int, _Room] = {}
        self.reset(1)

    def forwards(self) -> list[tuple[object, str]]:
        return [(self, "run")]

    def run(self, forward: Callable[[], Any]) -> Any:
        """A forward pass, where timers look for it: the replay of a graph, or calls."""
        return forward()

    def reset(self, rows: int) -> None:
        self.entropies = True
        self._take(rows, [0] * rows)
        self._room.key.zero_()
        self._room.value.zero_()

    def gather_rows(self, rows: Tensor) -> None:
        room, lengths = self._room, [self._lengths[row] for row in rows.tolist()]
        self._go_on_with(room.key[rows], room.value[rows], lengths)

    def beside(self) -> GraphedEagle:
        return GraphedEagle(self.head, self.name, self.capacity, self.graphs, self.features)

    def join(self, other: GraphedEagle) -> None:
        ours, theirs, lengths = self._room, other._room, self._lengths + other._lengths
        self._go_on_with(torch.cat([ours.key, theirs.key]), torch.cat([ours.value, theirs.value]), lengths)

    def _go_on_with(self, key: Tensor, value: Tensor, lengths: list[int]) -> None:
        self._take(len(lengths), lengths)
        self._room.key.copy_(key)
        self._room.value.copy_(value)

    def _take(self, rows: int, lengths: list[int]) -> None:
        if rows not in self._rooms:
            self._rooms[rows] = _Room(self, rows)
        self._room, self._lengths = self._rooms[rows], lengths

    def advance(self, tokens: Tensor, features: Tensor | None, counts: Tensor, everywhere: bool = False) -> Tensor:
        room, new, count = self._room, counts.tolist(), tokens.shape[1]
        bucket = bucket_of(CAUGHT_UP, count)
        spare = 0 if bucket is None else bucket - count
        numbers = np.zeros((len(new), count + spare + 2), dtype=np.int64)
        np.maximum(fetched(tokens).numpy(), 0, out=numbers[:, :count])
        numbers[:, -2], numbers[:, -1] = self._lengths, new
        self._lengths = [length + more for length, more in zip(self._lengths, new, strict=True)]
        # padded with zeros: NaN left by another text would pass through a mask
        features = F.pad(features[..., self.features], (0, 0, 0, spare))
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


class _Graph:
    """Where a graph's inputs are written, what replays it, and where its outputs then stand."""

    def __init__(self, numbers: Tensor, wide: Tensor | None, device: torch.device):
        """Inputs like those of :meth:`_Room.run`."""
        self.replayed: torch.cuda.CUDAGraph | None = None
        self.output: Any = None
        with torch.inference_mode(False):
            self.numbers = torch.zeros(numbers.shape, dtype=torch.int64, device=device)
            self.wide = None if wide is None else torch.zeros_like(wide)

    def write(self, numbers: Tensor, wide: Tensor | None) -> None:
        self.numbers.copy_(numbers, non_blocking=True)
        if wide is not None:
            self.wide.copy_(wide)

    def capture(self, compute: Callable[..., Any], memory: tuple[int, int] | None) -> None:
        """Behind :meth:`write`: the calls before a capture are real ones."""
        self.replayed, self.output = record(lambda: compute(self.numbers, self.wide), self.numbers.device, memory)


class _Room:
    """The cells and trees of R rows, at addresses that do not change, and what was captured for them."""

    def __init__(self, owner: GraphedEagle, rows: int):
        self.owner = owner
        head, device = owner.head, owner.device
        shape = rows, head.num_kv_heads, owner.capacity + SLOTS, head.head_dim
        with torch.inference_mode(False):  # tensors that may be written to in every mode
            self.key = torch.zeros(shape, dtype=owner.dtype, device=device)
            self.value = torch.zeros_like(self.key)
            self.prefix = torch.zeros(rows, dtype=torch.int64, device=device)
            self.hidden = torch.zeros((rows, SLOTS, head.hidden_size), dtype=owner.dtype, device=device)
            self.depth = torch.zeros((rows, SLOTS), dtype=torch.int64, device=device)
            self.sees = torch.zeros((rows, SLOTS, SLOTS), dtype=torch.bool, device=device)
            self.row = torch.arange(rows, device=device)[:, None]
            self.place = torch.arange(owner.capacity + SLOTS, device=device)
        self._graphs: dict[tuple, _Graph] = {}

    def run(self, key: tuple, compute: Callable[..., Any], numbers: Tensor, wide: Tensor | None, captured: bool) -> Any:
        """``compute(numbers, wide)``: the replay of its graph where it is to be captured and there is a GPU.

        :param numbers: int64 [R, N], on the host.   :param wide: [R, T, X] on the device, or None.
        """
        owner = self.owner
        if not (captured and owner.graphs):
            with updates_allowed():
                return owner.run(lambda: compute(sent(numbers, owner.device), wide))
        if key not in self._graphs:
            self._graphs[key] = _Graph(numbers, wide, owner.device)
        graph = self._graphs[key]
        graph.write(numbers, wide)
        if graph.replayed is None:
            graph.capture(compute, owner._memory)
        owner.run(graph.replayed.replay)
        return graph.output

    def advance(self, numbers: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of committed cells behind those before: of all T [R, T, H], and of each row's last one [R, H].

        :param numbers: tokens, cells before and how many count: int64 [R, T + 2].
        :param features: [R, T, F] of the places before the tokens.
        """
        head, count = self.owner.head, numbers.shape[1] - 2
        tokens, before, counts = numbers.split([count, 1, 1], 1)
        positions = before + torch.arange(count, device=numbers.device)
        residual, query, key, value = head.project(head.fuse(features), tokens, positions)
        self._write(key, value, positions)
        visible = self.place <= positions[:, :, None]  # tree cells lie behind all committed ones
        output = head.finish(residual, self._attend(query, visible))
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
        self._write(key, value, (self.owner.capacity + slots).expand_as(parent))
        committed = (self.place[: self.owner.capacity] < self.prefix[:, None])[:, None].expand(-1, count, -1)
        output = head.finish(residual, self._attend(query, torch.cat([committed, sees], dim=2)))
        self.depth[:, slots], self.sees[:, slots], self.hidden[:, slots] = depth, sees, output
        return head.logits(output)

    def _write(self, key: Tensor, value: Tensor, places: Tensor) -> None:
        """Keys and values [R, T, kv heads, d] at places int64 [R, T] of the buffer."""
        self.key.transpose(1, 2)[self.row, places] = key
        self.value.transpose(1, 2)[self.row, places] = value

    def _attend(self, query: Tensor, visible: Tensor) -> Tensor:
        """Attention of queries [R, T, heads, d] over the buffer's cells, of which ``visible`` bool [R, T, S] says who sees what."""
        shared = query.shape[2] // self.key.shape[1]
        key, value = (part.repeat_interleave(shared, dim=1) for part in (self.key, self.value))
        attended = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=visible[:, None])
        return attended.transpose(1, 2).flatten(2)
