"""What draft networks of fixed shapes share, so that a GPU replays their passes as CUDA graphs (see live/graphed.py).

For live decoding: one tree per row. A row's cells lie in buffers [R, kv heads, capacity + spare, d]: the committed ones from the
left, what a cycle adds behind the capacity. Attention looks at a whole buffer under a mask. Numbers of tokens to catch up on are
rounded up; what is computed beyond them is written over by what comes next.

What a pass needs is sent in one copy of small numbers before a replay, a ranking is part of the graph and fetched behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from live.border import sent
from live.graphed import bucket_of, record, updates_allowed

CAUGHT_UP = (1, 2, 4, 6, 9, 16)
"""Numbers of committed tokens that a catch-up is captured for."""


class Head(Protocol):
    """What heads of every kind have."""

    fc: nn.Linear
    num_kv_heads: int
    head_dim: int
    d2t: Tensor | None


class GraphedNetwork:
    """A draft network (live/network.py) of fixed shapes, for ``capacity`` committed cells of each row. Rankings lie on the host.

    layers, spare   of the head: how many hold cells; cells of a row behind the capacity
    """

    needs_features = True
    entropies = True
    layers = 1
    spare: int

    def __init__(
        self,
        head: Head,
        name: str,
        capacity: int = 2048,
        graphs: bool = True,
        features: slice = slice(None),
    ):
        """:param features: which of the captured numbers are the head's."""
        self.head, self.name, self.features = head, name, features
        self.capacity = -(-capacity // 64) * 64
        like = head.fc.weight
        self.dtype, self.device = like.dtype, like.device
        self.graphs = graphs and self.device.type == "cuda"
        self._memory = torch.cuda.graph_pool_handle() if self.graphs else None
        offsets = head.d2t
        self.target_ids = None if offsets is None else offsets + torch.arange(len(offsets), device=offsets.device)
        self._rooms: dict[int, Room] = {}
        self.reset(1)

    def room(self, rows: int) -> Room:
        """A new room for so many rows."""
        return Room(self, rows)

    def forwards(self) -> list[tuple[object, str]]:
        return [(self, "run")]

    def run(self, forward: Callable[[], Any]) -> Any:
        """A forward pass, where timers look for it: the replay of a graph, or calls."""
        return forward()

    def reset(self, rows: int) -> None:
        self.entropies = True
        self._take(rows, [0] * rows)
        self._room.cells.zero_()

    def gather_rows(self, rows: Tensor) -> None:
        room, lengths = self._room, [self._lengths[row] for row in rows.tolist()]
        self._go_on_with(room.cells[:, rows], lengths)

    def beside(self) -> GraphedNetwork:
        return type(self)(self.head, self.name, self.capacity, self.graphs, self.features)

    def join(self, other: GraphedNetwork) -> None:
        self._go_on_with(torch.cat([self._room.cells, other._room.cells], 1), self._lengths + other._lengths)

    def _go_on_with(self, cells: Tensor, lengths: list[int]) -> None:
        self._take(len(lengths), lengths)
        self._room.cells.copy_(cells)

    def _take(self, rows: int, lengths: list[int]) -> None:
        if rows not in self._rooms:
            self._rooms[rows] = self.room(rows)
        self._room, self._lengths = self._rooms[rows], lengths

    def _following(self, counts: list[int], features: Tensor) -> tuple[list[int], int | None, Tensor]:
        """Commit so many more cells of each row: the rows' lengths before, the bucket of the catch-up (None: there is none), and
        the head's features [R, T, F], as many as the bucket says."""
        before, width = self._lengths, features.shape[1]
        self._lengths = [length + more for length, more in zip(before, counts, strict=True)]
        bucket = bucket_of(CAUGHT_UP, width)
        # padded with zeros: NaN left by another text would pass through a mask
        return before, bucket, F.pad(features[..., self.features], (0, 0, 0, (bucket or width) - width))


class _Graph:
    """Where a graph's inputs are written, what replays it, and where its outputs then stand."""

    def __init__(self, numbers: Tensor, wide: Tensor | None, device: torch.device):
        """Inputs like those of :meth:`Room.run`."""
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


class Room:
    """The cells of R rows, at addresses that do not change, and what was captured for them."""

    def __init__(self, owner: GraphedNetwork, rows: int):
        self.owner = owner
        head, device = owner.head, owner.device
        shape = 2 * owner.layers, rows, head.num_kv_heads, owner.capacity + owner.spare, head.head_dim
        with torch.inference_mode(False):  # tensors that may be written to in every mode
            self.cells = torch.zeros(shape, dtype=owner.dtype, device=device)  # keys and values of each layer
            self.row = torch.arange(rows, device=device)[:, None]
            self.place = torch.arange(owner.capacity + owner.spare, device=device)
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

    def write(self, key: Tensor, value: Tensor, places: Tensor, layer: int = 0) -> None:
        """Keys and values [R, T, kv heads, d] at places int64 [R, T] of a layer's buffers."""
        for cells, new in zip(self.cells[2 * layer :], (key, value), strict=False):
            cells.transpose(1, 2)[self.row, places] = new

    def attend(self, query: Tensor, visible: Tensor, layer: int = 0) -> Tensor:
        """Attention [R, T, heads * d] of queries [R, T, heads, d] over a layer's cells where ``visible`` bool [R, T, S] says so."""
        shared = query.shape[2] // self.cells.shape[2]
        key, value = (self.cells[2 * layer + part].repeat_interleave(shared, dim=1) for part in (0, 1))
        attended = F.scaled_dot_product_attention(query.transpose(1, 2), key, value, attn_mask=visible[:, None])
        return attended.transpose(1, 2).flatten(2)
