"""A GPU without a GPU: tensors that say they lie on ``cuda:0``, and are worked out by the CPU.

So the branches that ask for the device are taken, and what a GPU would refuse is refused: tensors of host and device in one
operation, NumPy asked for a device's numbers. ``operations`` counts what the device is asked for and ``waits`` where the host waits
for it, by "file:line" of this repository. Graphs are captured and replayed as in tests/live/pretended_graphs.py;
while one is captured, the host may neither wait nor send anything.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from live import graphed, graphed_network
from tests.live.pretended_graphs import WAITING, PretendedGraph, replaced, tensors_in

DEVICE = torch.device("cuda", 0)
_ROOT = f"{Path(__file__).parents[2]}/"
_CROSSING = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_unsafe_index", "set_"}
"""Operations that take host and device tensors."""


class OnDevice(Tensor):
    """A tensor of the pretended GPU; ``held`` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device="meta"
        )
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)
    is_cuda, is_cpu, is_meta = (property(lambda self, own=own: own) for own in (True, False, False))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} is asked for outside of the pretended GPU")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.cpu().numpy()
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def __repr__(self) -> str:
        return f"OnDevice({self.held})"


class _Calls(TorchFunctionMode):
    """Calls that look for the device's driver, or ask what kind of device it is, before they reach an operation."""

    def __init__(self, gpu: PretendedGpu):
        super().__init__()
        self._gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and isinstance(args[0], OnDevice):
            given, named = replaced((args, kwargs), _held)
            with self._gpu.capturing or contextlib.nullcontext():
                return _on_device(func(*given, **named))
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and _is_gpu(kwargs.get("device")):
            if isinstance(args[0], OnDevice):
                return args[0] if kwargs.get("dtype") in (None, args[0].dtype) else args[0].to(kwargs["dtype"])
            return _moved(func(*args, **(kwargs | {"device": "cpu"})), None)
        if func is Tensor.new_tensor and isinstance(args[0], OnDevice):
            return _moved(torch.tensor(args[1], dtype=kwargs.get("dtype") or args[0].dtype), None)
        if func in (Tensor.to, Tensor.cuda):
            named = [part for part in (*args[1:], *kwargs.values()) if isinstance(part, (str, torch.device, Tensor))]
            devices = [part.device if isinstance(part, Tensor) else torch.device(part) for part in named]
            if func is Tensor.cuda or any(map(_is_gpu, devices)):
                dtypes = [part for part in (*args[1:], *kwargs.values()) if isinstance(part, torch.dtype)]
                dtypes += [part.dtype for part in named if isinstance(part, Tensor)]
                return _moved(args[0], dtypes[0] if dtypes else None)
        return func(*args, **kwargs)


def _moved(values: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The values on the device."""
    there = values if isinstance(values, OnDevice) else torch.empty_like(values, device=DEVICE).copy_(values)
    return there if dtype in (None, there.dtype) else there.to(dtype)


def _on_device(held: Tensor) -> OnDevice:
    with torch.inference_mode(False):  # ``held`` remembers in which mode it was made
        return OnDevice(held)


def _held(part: Any) -> Any:
    """The numbers of a tensor of the device; anything else as it is."""
    return part.held if isinstance(part, OnDevice) else part


def _placed(part: Any) -> Any:
    """A tensor as one of the device; anything else as it is."""
    return _on_device(part) if isinstance(part, Tensor) else part


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class PretendedGpu(TorchDispatchMode):
    """Within, there is a GPU; see the module's text."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.graphs: list[PretendedGraph] = []
        self.capturing: PretendedGraph | None = None
        self._calls = _Calls(self)

    def __enter__(self) -> PretendedGpu:
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._calls.__exit__(*raised)

    def forget(self) -> None:
        """Begin to count anew."""
        self.operations.clear()
        self.waits.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device, tensors = kwargs.get("device"), tensors_in((args, kwargs))
        on = [part for part in tensors if isinstance(part, OnDevice)]
        if not on and not _is_gpu(device):
            return func(*args, **(kwargs if device is None else kwargs | {"device": torch.device("cpu")}))
        name = func.overloadpacket.__name__
        beside = [part for part in tensors if not isinstance(part, OnDevice) and part.dim()]
        indexed_here = "index" in name and on and not isinstance(args[0], OnDevice)
        if indexed_here or (on and beside and name not in _CROSSING):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} was given cuda:0 and cpu")
        here = device is not None and not _is_gpu(device)
        brought_home = name == "copy_" and not isinstance(args[0], OnDevice) and bool(on)
        if on and (name in WAITING or here or brought_home):
            self._count(self.waits)
        elif not here:
            self._count(self.operations)
        if self.capturing is not None:
            self._check_capture(name, beside, here)
        given, named = replaced((args, kwargs), _held)
        if device is not None:
            named["device"] = torch.device("cpu")
        with self.capturing if self.capturing is not None and not here else contextlib.nullcontext():
            result = func(*given, **named)
        if here or name == "_local_scalar_dense":
            return result
        same = {id(part.held): part for part in on}  # what an operation in place gives back is what it was given
        return replaced(result, lambda part: same[id(part)] if id(part) in same else _placed(part))

    def _check_capture(self, name: str, beside: list[Tensor], here: bool) -> None:
        if here or (beside and name in _CROSSING):
            raise RuntimeError(f"{name} moves numbers between host and device during a capture")

    def _count(self, counter: Counter[str]) -> None:
        frame = sys._getframe(1)
        while frame is not None and not _is_own(frame.f_code.co_filename):
            frame = frame.f_back
        counter[f"{frame.f_code.co_filename.removeprefix(_ROOT)}:{frame.f_lineno}" if frame else "elsewhere"] += 1


@cache
def _is_own(file: str) -> bool:
    """Whether it is a file of the product."""
    return file.startswith(_ROOT) and not any(part in file for part in (".venv", "site-packages", "pretended"))


@contextlib.contextmanager
def pretended_gpu() -> Iterator[PretendedGpu]:
    """A GPU, ``torch.cuda`` with it, and graphs on it."""
    gpu = PretendedGpu()
    pools: dict[Any, list[PretendedGraph]] = {}
    numbers = count()

    def record(compute, device, memory):
        with graphed.updates_allowed():
            compute()
            graph = gpu.capturing = PretendedGraph(pools.setdefault(memory, []))
            try:
                result = compute()
            finally:
                gpu.capturing = None
            graph.keep(tree_map_only(OnDevice, lambda part: part.held, result))
        gpu.graphs.append(graph)
        return graph, result

    with pytest.MonkeyPatch.context() as patch:
        for module in (graphed, graphed_network):
            patch.setattr(module, "record", record)
        told = {"is_available": True, "device_count": 1, "current_device": 0, "is_initialized": True}
        about = SimpleNamespace(name="a pretended GPU", total_memory=16 << 30, major=9, minor=0)
        told |= {"get_device_name": about.name, "get_device_properties": about}
        told |= dict.fromkeys(("synchronize", "empty_cache", "_lazy_init"))
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(numbers)))
        for name, value in told.items():
            patch.setattr(torch.cuda, name, lambda *_, value=value: value)
        patch.setattr(torch, "Generator", lambda device="cpu", own=torch.Generator: own())  # the numbers are drawn on the CPU
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # a parameter moved there is another tensor
        try:
            with gpu:
                yield gpu
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(before)
