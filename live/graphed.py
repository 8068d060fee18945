"""A target whose forwards have fixed shapes, so that a GPU replays them as CUDA graphs instead of launching kernel by kernel.

The cache has a fixed capacity and fixed addresses, attention always looks at all of it under a mask, and the number of new
tokens is rounded up to the next *bucket*. One graph is captured per number of rows and bucket, on first use: so a measurement
decodes everything once before it times anything. Prompts, and trees beyond the largest bucket, run as in :class:`CachedModel`.

On a CPU there are no graphs: the same code runs with the same fixed shapes, which is how the tests compare it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from live.border import fetched
from live.cache import TreeCache, TreeLayer
from live.model import CachedModel, Output
from policies.errors import UserError

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
"""Numbers of new tokens that a forward is captured for."""
_ALIGNED = 64
"""Capacities are multiples of this: masks of odd widths send attention to a slower kernel."""
_WARM_UP = 2
"""Plain calls before a capture: libraries choose and allocate in the first what must not change later."""
failed_captures: list[str] = []
"""Of this process: why CUDA ended captures. Torch then believes that they go on, and the process should measure nothing more."""

Result = TypeVar("Result")


class StaticLayer(TreeLayer):
    """A layer's keys and values [R, kv_heads, capacity, d] at addresses that never change."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """In a forward of fixed shape, write where ``cache.places`` says and return all slots; else as the base class does."""
        if self.cache.places is None:
            return super().update(key_states, value_states, *args, **kwargs)
        rows, slots = self.cache.places
        self.keys.transpose(1, 2)[rows, slots] = key_states.transpose(1, 2)
        self.values.transpose(1, 2)[rows, slots] = value_states.transpose(1, 2)
        return self.keys, self.values


class StaticTreeCache(TreeCache):
    """A :class:`TreeCache` that never grows and has one storage for each number of rows it has had.

    ``places`` are row [R, 1] and slot [R, T] of the new tokens during a forward of fixed shape, else None.
    """

    def __init__(self, model: PreTrainedModel, rows: int, capacity: int, device: torch.device):
        config = model.config.get_text_config(decoder=True)
        self._shape = config.num_key_value_heads, capacity, config.head_dim
        self._dtype = model.dtype
        self._pools: dict[int, Tensor] = {}
        self.places: tuple[Tensor, Tensor] | None = None
        super().__init__(rows, capacity, config.num_hidden_layers, device)
        self.layers = [StaticLayer(self) for _ in range(config.num_hidden_layers)]
        self.clear(rows)

    def clear(self, rows: int) -> None:
        """Forget every text and go on with ``rows`` empty rows."""
        self._take(rows).zero_()
        self.rows = rows
        self._set_lengths([0] * rows)

    def gather(self, rows: Tensor) -> None:
        """Go on with these rows (int64 [R'], -1 = a new empty row), in the storage of so many rows; drops the tree."""
        chosen = rows.tolist()
        kept = self._pools[self.rows].index_select(1, rows.clamp(min=0).to(self.device))
        kept[:, [place for place, row in enumerate(chosen) if row < 0]] = 0
        self._take(len(chosen)).copy_(kept)
        self.rows = len(chosen)
        self._set_lengths([self.host_lengths[row] if row >= 0 else 0 for row in chosen])

    def _take(self, rows: int) -> Tensor:
        """Let the layers use the storage for so many rows, [2 layers, R, kv_heads, capacity, d]; made on first use."""
        if rows not in self._pools:
            groups, capacity, size = self._shape
            with torch.inference_mode(False):  # a tensor that may be written to in every mode
                shape = 2 * len(self.layers), rows, groups, capacity, size
                self._pools[rows] = torch.zeros(shape, dtype=self._dtype, device=self.device)
        storage = self._pools[rows]
        self._groups = [(storage, [])]
        self._adopt(0, storage, [(layer, name) for layer in self.layers for name in ("keys", "values")])
        for layer in self.layers:
            layer.is_initialized, layer.dtype, layer.device = True, storage.dtype, storage.device
        return storage

    def _grow(self, capacity: int) -> None:
        raise UserError(f"a text with its tree needs more than the static cache's {self.capacity} slots: give it more capacity")


class GraphedModel(CachedModel):
    """:class:`CachedModel` with forwards of fixed shape; same results, up to the rounding of sums.

    :param capacity: slots per row, for the longest text with its tree, and the largest bucket.
    :param graphs: replay CUDA graphs (on a GPU); False runs the same fixed shapes kernel by kernel, to see what graphs save.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: int = 1,
        capacity: int = 2048,
        layers_to_capture: tuple[int, ...] = (),
        graphs: bool = True,
        buckets: tuple[int, ...] = BUCKETS,
    ):
        super().__init__(model, rows, 1, layers_to_capture)
        capacity = -(-capacity // _ALIGNED) * _ALIGNED
        self.cache = StaticTreeCache(model, rows, capacity, self.device)
        self.buckets, self.graphs = buckets, graphs and self.device.type == "cuda"
        self._shapes: dict[tuple[int, int], _Fixed] = {}
        self._replaying: torch.cuda.CUDAGraph | None = None
        self._memory = torch.cuda.graph_pool_handle() if self.graphs else None

    def prefill(
        self, tokens: Tensor, counts: Tensor | None = None, logits: Literal["all", "last", "none"] = "last"
    ) -> Output:
        """One more token in every row is a tree of its root alone; prompts run in any shape."""
        every_row = counts is None or min(counts.tolist(), default=0) == 1
        if tokens.shape[1] != 1 or not every_row or logits == "none" or not self._fits(1):
            return super().prefill(tokens, counts, logits)
        self._check_context(self.cache.longest + 1)
        positions = torch.tensor(self.cache.host_lengths)[:, None]
        output = self._fixed(tokens, positions, torch.ones((self.rows, 1, 1), dtype=torch.bool))
        self.cache.extend([1] * self.rows)
        return output

    def forward_tree(self, tokens: Tensor, prefix: Tensor | None, positions: Tensor, ancestors: Tensor) -> Output:
        """A first tree behind all of each row's text, as the loop verifies it, runs in fixed shape."""
        new = tokens.shape[1]
        if prefix is not None or not self._fits(new):
            return super().forward_tree(tokens, prefix, positions, ancestors)
        if self.cache.longest + new > self.context_limit:
            self._check_context(int(positions.max()) + 1)
        output = self._fixed(tokens, positions, ancestors)
        self.cache.tree_size = new
        return output

    def _fits(self, new: int) -> bool:
        """Whether ``new`` tokens, the first behind all rows' text, have a bucket, and that a place in the cache."""
        bucket, cache = bucket_of(self.buckets, new), self.cache
        return bucket is not None and not cache.tree_size and 0 < cache.longest <= cache.capacity - bucket

    def _fixed(self, tokens: Tensor, positions: Tensor, sees: Tensor) -> Output:
        """One forward of fixed shape; see :meth:`_Fixed.run`."""
        self.cache.open(tokens.shape[1])
        key = self.cache.rows, bucket_of(self.buckets, tokens.shape[1])
        if key not in self._shapes:
            self._shapes[key] = _Fixed(self, key[1])
        return self._shapes[key].run(tokens, positions, sees)

    def run(self, tokens: Tensor, positions: Tensor, mask: Tensor | None, extra: dict[str, Tensor]) -> Tensor | None:
        """The network's forward pass, where timers look for it: the replay of a graph (its outputs are known), or calls."""
        if self._replaying is None:
            return super().run(tokens, positions, mask, extra)
        self._replaying.replay()
        return None


def bucket_of(buckets: tuple[int, ...], new: int) -> int | None:
    """The least of ``buckets`` that holds ``new`` tokens or nodes; None when none does."""
    return next((size for size in buckets if size >= new), None)


class _Fixed:
    """One forward of R rows and T new tokens: its inputs, its outputs and, on a GPU, its graph.

    ``numbers`` int64 [R, 2 T + 1] are tokens, positions and the length of each row; ``sees`` bool [R, T, T], which new tokens each
    new token attends to. Two copies of a cycle's worth of numbers are all that is sent; masks are made by the graph.
    """

    def __init__(self, owner: GraphedModel, size: int):
        self.owner, self.size = owner, size
        rows, device = owner.cache.rows, owner.device
        with torch.inference_mode(False):
            self.numbers = torch.zeros((rows, 2 * size + 1), dtype=torch.int64, device=device)
            self.sees = torch.zeros((rows, size, size), dtype=torch.bool, device=device)
            self.row = torch.arange(rows, device=device)[:, None]
            self.step = torch.arange(size, device=device)
            self.place = torch.arange(owner.cache.capacity, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Output | None = None

    def run(self, tokens: Tensor, positions: Tensor, sees: Tensor) -> Output:
        """``tokens``, ``positions`` int64 [R, t], t <= T; ``sees`` bool [R, t, t]. All see their row's whole text."""
        new = tokens.shape[1]
        # what lies behind the new tokens is not looked at
        numbers, visible = np.zeros(self.numbers.shape, dtype=np.int64), np.zeros(self.sees.shape, dtype=bool)
        numbers[:, :new], numbers[:, self.size : self.size + new] = fetched(tokens).numpy(), fetched(positions).numpy()
        numbers[:, -1], visible[:, :new, :new] = self.owner.cache.host_lengths, fetched(sees).numpy()
        self.numbers.copy_(torch.from_numpy(numbers), non_blocking=True)
        self.sees.copy_(torch.from_numpy(visible), non_blocking=True)
        if not self.owner.graphs:
            with updates_allowed():
                self.output = self._compute(self.owner.run)
        else:
            if self.graph is None:
                self._capture()
            self._replay()
        logits, captured = self.output
        return Output(logits[:, :new], None if captured is None else captured[:, :new])

    def _replay(self) -> None:
        self.owner._replaying = self.graph
        try:
            self.owner.run(self.numbers, self.numbers, None, {})  # a graph knows where its inputs stand
        finally:
            self.owner._replaying = None

    def _compute(self, run: Callable[..., Tensor]) -> Output:
        owner, size = self.owner, self.size
        tokens, positions, length = self.numbers.split([size, size, 1], 1)
        slots = length + self.step
        owner.cache.places = (self.row, slots)
        extra = {"cache_position": slots[0]} if owner._wants_cache_position else {}
        try:
            with owner.streams:
                logits = run(tokens, positions, self._mask(length), extra)
        finally:
            owner.cache.places = None
        return Output(logits, owner.streams.take(owner.device))

    def _mask(self, length: Tensor) -> Tensor:
        """Additive mask [R, 1, T, capacity] for texts of ``length`` int64 [R, 1]."""
        behind = (self.place - length)[:, None]  # [R, 1, capacity]: which new token lies in a slot
        new = self.sees.gather(2, behind.clamp(0, self.size - 1).expand(-1, self.size, -1)) & (behind < self.size)
        mask = torch.zeros(new.shape, dtype=self.owner.dtype, device=self.owner.device)
        return mask.masked_fill_(~new & (behind >= 0), self.owner._hidden)[:, None]

    def _capture(self) -> None:
        """Record the forward's kernels."""
        run = partial(CachedModel.run, self.owner)  # no timer around it: waiting for the device would end the capture
        self.graph, self.output = record(lambda: self._compute(run), self.owner.device, self.owner._memory)


@contextmanager
def updates_allowed() -> Iterator[None]:
    """No gradients, and not inference mode, whatever the caller's: what is made inside may be written to in every mode. That
    holds for a graph's outputs, and for what torch itself keeps with the first graph, the state of its random numbers."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@lru_cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """The stream of all warm-ups and captures: one, so that the matrix library's workspace, which belongs to a stream, is
    allocated by the first warm-up and never inside a capture."""
    return torch.cuda.Stream(device)


def record(compute: Callable[[], Result], device: torch.device, memory: tuple[int, int]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A CUDA graph of ``compute``, which reads and writes tensors at fixed addresses, and where its result will stand.

    :param memory: of :func:`torch.cuda.graph_pool_handle`, shared by graphs that never run at the same time. A result stands until
        the next replay of any of them, which may write over it: it is used, or copied, before that.
    """
    stream = _aside(device)
    with updates_allowed():
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                compute()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph, outside = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
        try:
            # other threads may allocate meanwhile: what they do is no part of the graph
            with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
                result = compute()
        except Exception as error:
            if torch.cuda.current_stream(device) != outside:  # its end failed, too
                failed_captures.append(f"{type(error).__name__}: {error}"[:500])
            raise
    return graph, result
