"""Keys and values of the places that rows have committed, and behind them room for what a cycle adds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from live.border import fetched, sent


class Cells:
    """Of each layer a buffer of keys and one of values, [R, kv heads, capacity, d]: the rows' committed cells from the left, and
    behind the longest row's those of this cycle, where the next committed cells are written over them.

    length    int64 [R] committed cells of each row, on the host, as who counts
    shortest, longest  of the rows
    """

    def __init__(self, rows: int, heads: int, size: int, like: Tensor, layers: int = 1):
        """:param heads: of keys and values, of ``size`` numbers each. :param like: for dtype and device."""
        self.keys = [like.new_zeros((rows, heads, 0, size)) for _ in range(layers)]
        self.values = [like.new_zeros((rows, heads, 0, size)) for _ in range(layers)]
        self.device = like.device
        self._set_length(torch.zeros(rows, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.keys[0])

    def following(self, counts: Tensor, width: int) -> tuple[Tensor, int | Tensor]:
        """Commit ``counts`` int64 [R] more cells, of ``width`` that are to be written: their positions int64 [R, width] on the
        device, and where :meth:`write` puts them."""
        positions = sent(self.length[:, None] + torch.arange(width), self.device)
        place = self.longest if self.shortest == self.longest else positions
        self._set_length(self.length + fetched(counts))
        return positions, place

    def write(self, key: Tensor, value: Tensor, place: int | Tensor, layer: int = 0) -> None:
        """Keys and values [R, T, kv heads, d] from cell ``place`` on, or to the cells int64 [R, T] where rows differ in length."""
        count = key.shape[1]
        needed = (self.longest if isinstance(place, Tensor) else place) + count
        row = torch.arange(len(key), device=key.device)[:, None] if isinstance(place, Tensor) else None
        for buffers, new in ((self.keys, key), (self.values, value)):
            cells = buffers[layer] = with_room(buffers[layer], 2, needed)
            if isinstance(place, Tensor):
                cells.transpose(1, 2)[row, place] = new
            else:
                cells.narrow(2, place, count).copy_(new.transpose(1, 2))

    def keep(self, rows: Tensor) -> None:
        """Only these rows int64 [R']."""
        for buffers in (self.keys, self.values):
            buffers[:] = [part[rows] for part in buffers]
        self._set_length(self.length[fetched(rows)])

    def join(self, other: Cells) -> None:
        """The rows of ``other`` behind our own, those with fewer cells padded on the right."""
        for buffers, theirs in ((self.keys, other.keys), (self.values, other.values)):
            buffers[:] = [_stacked(*parts) for parts in zip(buffers, theirs, strict=True)]
        self._set_length(torch.cat([self.length, other.length]))

    def _set_length(self, length: Tensor) -> None:
        self.length = length
        lengths = length.tolist()
        self.shortest, self.longest = min(lengths, default=0), max(lengths, default=0)


def with_room(values: Tensor, axis: int, count: int) -> Tensor:
    """Values with room for ``count`` along an axis, zeros where they grew; grown, they double: it costs little per entry."""
    held = values.shape[axis]
    if count <= held:
        return values
    return F.pad(values, (0, 0) * (values.dim() - 1 - axis) + (0, max(count - held, held)))


def _stacked(ours: Tensor, theirs: Tensor) -> Tensor:
    cells = max(ours.shape[2], theirs.shape[2])
    return torch.cat([F.pad(part, (0, 0, 0, cells - part.shape[2])) for part in (ours, theirs)])
