"""A key/value cache that holds, per row, a committed text and a tree of drafted tokens behind it.

Slots of row r: ``0 .. lengths[r]-1`` are the committed tokens, ``lengths[r] .. lengths[r]+tree_size-1`` the tree.
What lies further is leftover: finite numbers that a mask hides and that the next write replaces.
All layers of one shape live in one tensor, so that accepting a path moves a+1 entries in one gather and one write.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from live.border import sent


class TreeLayer(CacheLayerMixin):
    """Keys and values of one decoder layer: two tensors [rows, kv_heads, capacity, head_dim], in the model's dtype.

    Where to write and how much to show is the same in all layers and decided once per forward by :class:`TreeCache`.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, cache: TreeCache):
        super().__init__()
        self.cache = weakref.proxy(cache)  # else keys and values would outlive their use, until Python searches for cycles

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the shapes of the first states [R, kv_heads, T, head_dim]."""
        cache = self.cache
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(cache.rows, key_states.shape[1], cache.capacity, key_states.shape[3])
        self.values = value_states.new_zeros(cache.rows, value_states.shape[1], cache.capacity, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write new states [R, kv_heads, T, head_dim]; return views of all slots in use [R, kv_heads, S, head_dim]."""
        if self.keys is None:
            self.lazy_initialization(key_states, value_states)
        cache = self.cache
        if cache.start is not None:
            self.keys.narrow(2, cache.start, cache.new).copy_(key_states)
            self.values.narrow(2, cache.start, cache.new).copy_(value_states)
        else:
            rows, slots = cache.where_to_write(key_states.device)
            self.keys.transpose(1, 2)[rows, slots] = key_states.transpose(1, 2)
            self.values.transpose(1, 2)[rows, slots] = value_states.transpose(1, 2)
        return self.keys.narrow(2, 0, cache.end), self.values.narrow(2, 0, cache.end)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(slots shown to this forward, offset 0)."""
        return self.cache.end, 0

    def get_seq_length(self) -> int:
        """Slots in use before this forward's own (the longest row's)."""
        return self.cache.end - self.cache.new

    def get_max_length(self) -> int:
        """-1: grows without a limit of its own."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.18


class TreeCache(Cache):
    """Cache of a whole model; see the module's text for the layout.

    :param rows: R, texts side by side.   :param capacity: slots per row to begin with; doubles as needed.
    :param layers: decoder layers.   :param device: where ``lengths`` lives.

    ``host_lengths`` are the committed tokens of each row; the loop counts on the host, and whoever indexes on the device takes
    ``lengths``, int64 [R].
    """

    def __init__(self, rows: int, capacity: int, layers: int, device: torch.device):
        super().__init__(layers=[TreeLayer(self) for _ in range(layers)])
        self.capacity = max(capacity, 1)
        self.device = device
        self._groups: list[tuple[Tensor, list[tuple[TreeLayer, str]]]] = []
        self.clear(rows)

    def clear(self, rows: int) -> None:
        """Forget every text and go on with ``rows`` empty rows; memory is kept when the number of rows stays."""
        if rows != getattr(self, "rows", None):
            self._groups = []
            for layer in self.layers:
                layer.keys = layer.values = None
                layer.is_initialized = False
        single = [part for layer in self.layers if layer.is_initialized for part in (layer.keys, layer.values)]
        with torch.inference_mode():  # storage made by a decoder may be written to in this mode only
            for storage in [storage for storage, _ in self._groups] or single:  # single ones until the first commit
                storage.zero_()  # a NaN of a failed text would pass through a mask: 0 * NaN
        self.rows = rows
        self._set_lengths([0] * rows)

    def _set_lengths(self, lengths: list[int]) -> None:
        self.host_lengths, self._lengths = lengths, None
        self.longest = max(lengths, default=0)
        self.uniform = min(lengths, default=0) == self.longest
        self.tree_size = 0
        self.start: int | None = 0
        self.new, self.end = 0, 0
        self._places: tuple[Tensor, Tensor] | None = None

    @property
    def lengths(self) -> Tensor:
        """Committed tokens per row, int64 [R], on the device."""
        if self._lengths is None:
            self._lengths = sent(torch.tensor(self.host_lengths, dtype=torch.int64), self.device)
        return self._lengths

    # ---- around one forward -------------------------------------------------------------------------------------

    def open(self, new: int) -> None:
        """Make room for ``new`` slots per row behind the tree and say where the next forward writes."""
        self.new, self.end = new, self.longest + self.tree_size + new
        self.start = self.longest + self.tree_size if self.uniform else None
        self._places = None
        if self.end > self.capacity:
            self._grow(max(self.end, 2 * self.capacity))

    def where_to_write(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row [R, 1] and slot [R, T] of each new token when rows differ in length; made once per forward and device."""
        if self._places is None or self._places[0].device != device:
            steps = torch.arange(self.new, device=device)
            rows = torch.arange(self.rows, device=device)
            self._places = (rows[:, None], (self.lengths.to(device) + self.tree_size)[:, None] + steps)
        return self._places

    def _grow(self, capacity: int) -> None:
        self._fuse()
        used = self.capacity
        self.capacity = capacity
        for number, (old, entries) in enumerate(self._groups):
            storage = old.new_zeros(*old.shape[:3], capacity, old.shape[4])
            storage[:, :, :, :used] = old
            self._adopt(number, storage, entries)

    def _fuse(self) -> None:
        """Put all tensors of one shape into one, [n, R, kv_heads, capacity, head_dim] (after the first forward)."""
        if self._groups:
            return
        kinds: dict[tuple, list[tuple[TreeLayer, str]]] = {}
        for layer in self.layers:
            for name in ("keys", "values") if layer.is_initialized else ():
                part = getattr(layer, name)
                kinds.setdefault((part.shape, part.dtype, part.device), []).append((layer, name))
        self._groups = [(torch.empty(0), entries) for entries in kinds.values()]
        for number, (_, entries) in enumerate(self._groups):
            self._adopt(number, torch.stack([getattr(layer, name) for layer, name in entries]), entries)

    def _adopt(self, number: int, storage: Tensor, entries: list[tuple[TreeLayer, str]]) -> None:
        self._groups[number] = (storage, entries)
        for (layer, name), part in zip(entries, storage.unbind(0), strict=True):
            setattr(layer, name, part)

    # ---- between forwards ---------------------------------------------------------------------------------------

    def extend(self, counts: list[int]) -> None:
        """Count the first ``counts[r]`` of the slots just written as committed (prefill)."""
        self._set_lengths([a + b for a, b in zip(self.host_lengths, counts, strict=True)])

    def commit(self, slots: Tensor, counts: Tensor) -> None:
        """Move tree slots ``slots[r, :counts[r]]`` (int64 [R, A], relative to the tree) behind the committed text.

        The rest of the tree is dropped. Work is proportional to the entries moved, not to the context.
        """
        host_counts, listed = counts.tolist(), slots.tolist()
        most, chosen = max(host_counts, default=0), [row[:count] for row, count in zip(listed, host_counts, strict=True)]
        if most > self.tree_size or any(not 0 <= slot < self.tree_size for row in chosen for slot in row):
            raise ValueError(f"commit() names a slot outside the tree's {self.tree_size}")
        kept = min((_in_place(row, most) for row in chosen), default=0)
        if kept < most:
            self._fuse()
            for storage, _ in self._groups:
                self._move(storage, sent(slots[:, kept:most], storage.device), kept)
        self.extend(host_counts)

    def _move(self, storage: Tensor, slots: Tensor, first: int) -> None:
        if self.rows == 1:
            moved = storage.index_select(3, slots[0] + self.longest)
            storage.narrow(3, self.longest + first, slots.shape[1]).copy_(moved)
            return
        rows = torch.arange(self.rows, device=storage.device)[:, None]
        begin = self.lengths.to(storage.device)[:, None]
        target = begin + torch.arange(first, first + slots.shape[1], device=storage.device)
        by_slot = storage.permute(1, 3, 0, 2, 4)  # [R, capacity, n, kv_heads, head_dim], a view
        # past a row's count the target lies behind its committed text, where anything finite may stand
        by_slot[rows, target] = by_slot[rows, begin + slots.clamp(min=0)]

    def drop_tree(self) -> None:
        """Forget the tree; the committed text stays."""
        self.tree_size = 0

    def gather(self, rows: Tensor) -> None:
        """Go on with these rows (int64 [R'], in this order, repeats allowed; -1 = a new empty row); drops the tree."""
        chosen = rows.tolist()
        self._fuse()
        fresh = [place for place, row in enumerate(chosen) if row < 0]
        for number, (old, entries) in enumerate(self._groups):
            storage = old.index_select(1, rows.clamp(min=0).to(old.device))
            storage[:, fresh] = 0
            self._adopt(number, storage, entries)
        self.rows = len(chosen)
        self._set_lengths([self.host_lengths[row] if row >= 0 else 0 for row in chosen])

    def join(self, other: TreeCache) -> None:
        """The rows of ``other``, a cache of the same model, behind our own; drops both trees."""
        own, used = self.rows, other.longest
        self.gather(torch.tensor([*range(own), *[-1] * other.rows]))
        if used > self.capacity:
            self._grow(max(used, 2 * self.capacity))
        for ours, theirs in zip(self.layers, other.layers, strict=True):
            if not ours.is_initialized:  # without attention, or reading another layer's keys: it keeps nothing
                continue
            ours.keys[own:, :, :used] = theirs.keys[:, :, :used]
            ours.values[own:, :, :used] = theirs.values[:, :, :used]
        self._set_lengths(self.host_lengths[:own] + other.host_lengths)


def _in_place(slots: list[int], most: int) -> int:
    """How many leading slots already stand where they belong (``most`` when all do)."""
    for place, slot in enumerate(slots):
        if slot != place:
            return place
    return most
