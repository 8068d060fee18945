"""The EAGLE-3 head in fixed shapes, so that a GPU replays catch-ups and draft levels as CUDA graphs (see live/graphed.py).

For live decoding: one tree per row. A row's cells lie in one buffer [R, kv heads, capacity + SLOTS, d]: the committed ones from
the left, and the cell of tree slot s at capacity + s. Attention looks at the whole buffer under a mask. Frontier widths and
numbers of tokens to catch up on are rounded up; what is computed beyond them is written over by what comes next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from live.distribution import Ranked, ranked
from live.eagle3 import Eagle3Head
from live.graphed import record, updates_allowed

SLOTS = 256
"""Tree slots of a row; a draft tree that expands more nodes is a crash of the draft, which decoding survives."""
WIDTHS = (1, 2, 4, 8, 10, 16, 24, 32, 48, 64)
"""Frontier widths that a level is captured for."""
CAUGHT_UP = (1, 2, 4, 6, 9, 16)
"""Numbers of committed tokens that a catch-up is captured for."""


class GraphedEagle:
    """A draft network (live/network.py) of fixed shapes, for ``capacity`` committed cells of each row."""

    kind = "eagle3"
    needs_features = True
    entropies = True

    def __init__(self, head: Eagle3Head, name: str = "eagle3", capacity: int = 2048, graphs: bool = True):
        self.head, self.name = head, name
        self.capacity = -(-capacity // 64) * 64
        like = head.fc.weight
        self.dtype, self.device = like.dtype, like.device
        self.graphs = graphs and self.device.type == "cuda"
        self._memory = torch.cuda.graph_pool_handle() if self.graphs else None
        self._rooms: dict[int, _Room] = {}
        self.reset(1)

    def forwards(self) -> list[tuple[object, str]]:
        return [(self, name) for name in ("_caught_up", "_level", "_root_logits")]

    def reset(self, rows: int) -> None:
        self.entropies = True
        self._take(rows)
        self._room.length.zero_()
        self._room.key.zero_()
        self._room.value.zero_()

    def gather_rows(self, rows: Tensor) -> None:
        old = self._room
        kept = [part[rows] for part in (old.key, old.value, old.length)]
        self._take(len(rows))
        for part, values in zip((self._room.key, self._room.value, self._room.length), kept, strict=True):
            part.copy_(values)

    def beside(self) -> GraphedEagle:
        return GraphedEagle(self.head, self.name, self.capacity, self.graphs)

    def join(self, other: GraphedEagle) -> None:
        parts = [[room.key, room.value, room.length] for room in (self._room, other._room)]
        joined = [torch.cat(both) for both in zip(*parts, strict=True)]
        self._take(len(joined[-1]))
        for part, values in zip((self._room.key, self._room.value, self._room.length), joined, strict=True):
            part.copy_(values)

    def _take(self, rows: int) -> None:
        if rows not in self._rooms:
            self._rooms[rows] = _Room(self, rows)
        self._room = self._rooms[rows]

    def advance(self, tokens: Tensor, features: Tensor | None, counts: Tensor, everywhere: bool = False) -> Tensor:
        hidden = self._caught_up(tokens.clamp(min=0), features)
        self._room.length.add_(counts)
        if everywhere:
            return hidden.clone()
        return hidden.gather(1, (counts - 1)[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]

    def _caught_up(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Outputs [R, T, H] of committed cells that follow those before."""
        room, count = self._room, tokens.shape[1]
        size = next((size for size in CAUGHT_UP if size >= count), count)
        inputs = {"tokens": F.pad(tokens, (0, size - count)), "features": F.pad(features, (0, 0, 0, size - count))}
        return room.run(("advance", size), room.advance, inputs, captured=size in CAUGHT_UP)[:, :count]

    def open(self, source: Tensor, context_length: Tensor, width: int) -> Ranked:
        room = self._room
        room.prefix.copy_(context_length)
        room.hidden[:, 0] = source
        room.depth.zero_()
        room.sees.zero_()
        self._slots = 1
        return self._children(ranked(self._root_logits(source), width, self.entropies))

    def _root_logits(self, source: Tensor) -> Tensor:
        return self.head.logits(source[:, None])[:, 0]

    def grow(self, parent: Tensor, token: Tensor, width: int) -> Ranked:
        logits = self._level(parent, token.clamp(min=0))
        self._slots += parent.shape[1]
        return self._children(ranked(logits, width, self.entropies))

    def _level(self, parent: Tensor, token: Tensor) -> Tensor:
        """Logits [R, W, Vd] of new slots, children of the slots ``parent`` int64 [R, W]."""
        room, count = self._room, parent.shape[1]
        size = next((size for size in WIDTHS if size >= count), count)
        if self._slots + size > SLOTS:
            size = count
        if self._slots + size > SLOTS:
            raise ValueError(f"the draft tree expands more than {SLOTS} nodes")
        padding = (0, size - count)
        inputs = {"parent": F.pad(parent, padding), "token": F.pad(token, padding), "first": torch.tensor(self._slots)}
        return room.run(("grow", size), room.grow, inputs, captured=size in WIDTHS)[:, :count]

    def _children(self, found: Ranked) -> Ranked:
        """From the draft vocabulary to the target's token ids (d2t holds offsets)."""
        if self.head.d2t is None:
            return found
        return found._replace(index=found.index + self.head.d2t[found.index])


class _Room:
    """The cells and trees of R rows, at addresses that do not change, and what was captured for them."""

    def __init__(self, owner: GraphedEagle, rows: int):
        self.owner = owner
        head, device = owner.head, owner.device
        shape = rows, head.num_kv_heads, owner.capacity + SLOTS, head.head_dim
        with torch.inference_mode(False):  # tensors that may be written to in every mode
            self.key = torch.zeros(shape, dtype=owner.dtype, device=device)
            self.value = torch.zeros_like(self.key)
            self.length = torch.zeros(rows, dtype=torch.int64, device=device)
            self.prefix = torch.zeros_like(self.length)
            self.hidden = torch.zeros((rows, SLOTS, head.hidden_size), dtype=owner.dtype, device=device)
            self.depth = torch.zeros((rows, SLOTS), dtype=torch.int64, device=device)
            self.sees = torch.zeros((rows, SLOTS, SLOTS), dtype=torch.bool, device=device)
            self.row = torch.arange(rows, device=device)[:, None]
            self.place = torch.arange(owner.capacity + SLOTS, device=device)
        self._inputs: dict[tuple[str, int], dict[str, Tensor]] = {}
        self._graphs: dict[tuple[str, int], tuple[Any, Tensor]] = {}

    def run(self, key: tuple[str, int], compute: Callable[..., Tensor], inputs: dict[str, Tensor], captured: bool) -> Tensor:
        """``compute`` of the inputs: the replay of its graph where it is to be captured and there is a GPU."""
        if not (captured and self.owner.graphs):
            with updates_allowed():
                return compute(**{name: value.to(self.key.device) for name, value in inputs.items()})
        if key not in self._inputs:
            with torch.inference_mode(False):
                self._inputs[key] = {
                    name: torch.zeros(value.shape, dtype=value.dtype, device=self.key.device) for name, value in inputs.items()
                }
        fixed = self._inputs[key]
        for name, value in inputs.items():
            fixed[name].fill_(int(value)) if value.dim() == 0 else fixed[name].copy_(value)
        if key not in self._graphs:
            self._graphs[key] = record(lambda: compute(**fixed), self.key.device, self.owner._memory)
        graph, output = self._graphs[key]
        graph.replay()
        return output

    def advance(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Cells of tokens int64 [R, T] with the features [R, T, F] of the places before them, behind the committed ones."""
        head = self.owner.head
        positions = self.length[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        hidden = head.fuse(features)
        query, key, value = head.project(hidden, tokens, positions)
        self._write(key, value, positions)
        visible = self.place <= positions[:, :, None]  # tree cells lie behind all committed ones
        return head.finish(hidden, self._attend(query, visible))

    def grow(self, parent: Tensor, token: Tensor, first: Tensor) -> Tensor:
        """Logits [R, W, Vd] of the slots from ``first`` (a number) on; what belongs to the slots is kept."""
        head, count = self.owner.head, parent.shape[1]
        slots = first + torch.arange(count, device=parent.device)
        depth = self.depth.gather(1, parent) + 1
        sees = self.sees.gather(1, parent[:, :, None].expand(-1, -1, SLOTS)) | (
            torch.arange(SLOTS, device=parent.device) == slots[:, None]
        )
        hidden = self.hidden.gather(1, parent[:, :, None].expand(-1, -1, self.hidden.shape[2]))
        query, key, value = head.project(hidden, token, self.prefix[:, None] + depth - 1)
        self._write(key, value, (self.owner.capacity + slots).expand_as(parent))
        committed = (self.place[: self.owner.capacity] < self.prefix[:, None])[:, None].expand(-1, count, -1)
        output = head.finish(hidden, self._attend(query, torch.cat([committed, sees], dim=2)))
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
