"""CUDA graphs without a GPU: what a capture allows and what a replay does, held against the code on a CPU.

A capture records the operations of one call. A replay runs them again on the same memory: nothing of Python runs along, tensors
from outside are read where they stood at the capture, results appear where they appeared then, and what lay between belongs to
the next graph. So an error is raised where the host would wait for a number during a capture or where memory that a graph reads
has been freed. What a graph leaves besides its results is made worthless behind its replay, and its results are when another graph
of the same memory is replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from live.graphed import updates_allowed

WAITING = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"}
"""Operations whose result the host has to see before it goes on."""


def tensors_in(parts: Iterable[Any]) -> list[Tensor]:
    """The tensors among an operation's arguments, lists, tuples and dictionaries of them included."""
    found: list[Tensor] = []
    for part in parts:
        if isinstance(part, Tensor):
            found.append(part)
        elif isinstance(part, (list, tuple, dict)):
            found += tensors_in(part.values() if isinstance(part, dict) else part)
    return found


def replaced(part: Any, by: Callable[[Any], Any]) -> Any:
    """What ``by`` makes of it; of lists, tuples and dictionaries of their parts. Torch's own trees know more and take ten times as
    long."""
    if type(part) is dict:
        return {key: replaced(inner, by) for key, inner in part.items()}
    if type(part) in (list, tuple):
        return type(part)([replaced(inner, by) for inner in part])
    return by(part)


@dataclass(frozen=True)
class _Outside:
    """Where a tensor stood that was not made in the capture; it is looked at and not held."""

    storage: StorageWeakRef
    like: tuple[torch.dtype, torch.Size, tuple[int, ...], int]

    def tensor(self) -> Tensor:
        dtype, size, stride, offset = self.like
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise AssertionError("the graph reads memory that was freed after its capture")
        return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)


def _found(part: Any) -> Any:
    return part.tensor() if isinstance(part, _Outside) else part


class PretendedGraph(TorchDispatchMode):
    """What is called within is recorded; ``replays`` counts. ``sharing`` are the graphs of the same memory, this one among them."""

    def __init__(self, sharing: list[PretendedGraph]) -> None:
        super().__init__()
        self.replays, self._sharing = 0, sharing
        sharing.append(self)
        self._steps: list[tuple[Callable, tuple[tuple, dict[str, Any]], list[Tensor | None]]] = []
        self._made: dict[int, torch.UntypedStorage] = {}
        self._kept: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        kwargs = kwargs or {}
        chosen = args[1] if name.startswith("index") and isinstance(args[1], (list, tuple)) else ()
        if name in WAITING or any(isinstance(part, Tensor) and part.dtype == torch.bool for part in chosen):
            raise AssertionError(f"{name} waits for the device during a capture")
        given = replaced((args, kwargs), self._told_apart)
        before = {part.untyped_storage()._cdata for part in tensors_in((args, kwargs))}
        result = func(*args, **kwargs)
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        new = [isinstance(part, Tensor) and part.untyped_storage()._cdata not in before for part in results]
        for part, own in zip(results, new, strict=True):
            if own:
                self._made[part.untyped_storage()._cdata] = part.untyped_storage()
        self._steps.append((func, given, [part if own else None for part, own in zip(results, new, strict=True)]))
        return result

    def keep(self, result: Any) -> None:
        """End the capture; all but the result is worthless until a replay, which the result is too."""
        tree_map_only(Tensor, lambda part: self._kept.add(part.untyped_storage()._cdata), result)
        self._kept &= self._made.keys()
        self._spoil(self._made)

    def _spoil(self, which: Iterable[int]) -> None:
        """Make memory of the capture worthless: NaN in all floating dtypes, -1 in all signed ones."""
        with _disable_current_modes():
            for key in which:
                self._made[key].fill_(255)

    def replay(self) -> None:
        self.replays += 1
        for other in self._sharing:
            other._spoil(other._kept)  # what lies between is so already
        with updates_allowed(), _disable_current_modes(), torch._C.DisableTorchFunction():
            for func, given, left in self._steps:
                args, kwargs = replaced(given, _found)
                result = func(*args, **kwargs)
                for part, place in zip(result if isinstance(result, (tuple, list)) else (result,), left, strict=True):
                    if place is not None:
                        place.copy_(part)
            self._spoil(self._made.keys() - self._kept)

    def _told_apart(self, part: Any) -> Any:
        if not isinstance(part, Tensor):
            return part
        storage = part.untyped_storage()
        if storage._cdata in self._made:
            return part
        return _Outside(StorageWeakRef(storage), (part.dtype, part.shape, part.stride(), part.storage_offset()))
