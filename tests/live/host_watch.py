"""Finds tensors that would stay on the host beside a model on a GPU, without a GPU.

A tensor that is made without naming a device lives on the host until it is sent to a device by ``.to(device)``, ``.cuda()`` or
the like. Where such a tensor meets one of a device in an operation, a GPU run would end in an error. Indexing with host
indices and host scalars are fine there, and here.
"""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MAKERS = {
    getattr(torch, name)
    for name in ("arange", "zeros", "ones", "full", "empty", "eye", "tensor", "as_tensor", "linspace", "rand", "randn", "randperm",
                 "randint", "from_numpy", "scalar_tensor")
}  # fmt: skip
_INDEXING = (Tensor.__getitem__, Tensor.__setitem__)
_ROOT = str(Path(__file__).parents[2])


class HostWatch(TorchFunctionMode):
    """Within, ``faults`` collects "file:line operation" of every meeting of host and device tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is Tensor.to and _names_device(args[1:], kwargs) and isinstance(result, Tensor):
            return result.detach().view_as(result) if _on_host(result) else result
        if func in _MAKERS:
            if kwargs.get("device") is None and not _tensors(args) and isinstance(result, Tensor):
                result._on_host = True
            return result
        told = _tensors(args[:1] if func in _INDEXING else (args, kwargs))
        host = [tensor for tensor in told if _on_host(tensor)]
        if host and any(tensor.dim() for tensor in host) and len(host) < len([t for t in told if t.dim()]):
            self.faults.add(f"{_place()} {getattr(func, '__name__', func)}")
        if host and len(host) == len(told):
            for made in _tensors((result,)):
                if not any(made is tensor for tensor in told):
                    made._on_host = True
        return result


def _on_host(tensor: Tensor) -> bool:
    return getattr(tensor, "_on_host", False)


def _names_device(args: tuple, kwargs: dict) -> bool:
    """Whether the arguments of ``.to`` name a device (a tensor stands for its own)."""
    named = [part for part in (*args, *kwargs.values()) if isinstance(part, (torch.device, str, Tensor))]
    return any(not isinstance(part, Tensor) or not _on_host(part) for part in named)


def _tensors(parts: object) -> list[Tensor]:
    if isinstance(parts, Tensor):
        return [parts]
    if isinstance(parts, dict):
        parts = tuple(parts.values())
    return [tensor for part in parts for tensor in _tensors(part)] if isinstance(parts, (tuple, list)) else []


def _place() -> str:
    """Where in this repository the operation was asked for."""
    own = [frame for frame in traceback.extract_stack() if frame.filename.startswith(_ROOT) and "host_watch" not in frame.filename]
    return f"{Path(own[-1].filename).relative_to(_ROOT)}:{own[-1].lineno}" if own else "elsewhere"
